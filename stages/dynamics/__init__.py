"""Learning dynamics: how a training step on one image moves the likelihood of others (Delta G) and the judgement (Delta U).

Everything follows arXiv 2507.16663, section 5. With the gradient g of a log-likelihood, and a training row whose loss has the
gradient l, a step of gradient descent at learning rate eta changes

    log p(x0 | y0)   by  Delta G = -eta g(x0, y0) . l + O(eta^2), and
    log p(y0 | x0)   by  Delta U = -eta sum over y of w(y | x0) [g(x0, y0) - g(x0, y)] . l + O(eta^2),

where p(y | x0) is Bayes' posterior over y0 and a set of alternative prompts with equal priors, and w are its values. For an
autoregressive model g . l is the paper's double sum over tokens of logit errors and the empirical tangent kernel, because the
gradient of a log-likelihood is the sum over tokens of the logit error times the gradient of the logits (tests/test_dynamics.py
compares both with an explicit Jacobian). Delta J is the same for the branch that answers questions: the change of the log odds
of yes. Terms are stored for eta = 1, and eta is multiplied where it is known.
"""
