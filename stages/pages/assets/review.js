"use strict";
// The review: one image at a time, blind, in an order of each reviewer's own. Answers are kept in localStorage, by sample and
// reviewer, and are saved as a CSV file with the columns that the judge of kind table reads.
const selfgap = (() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const at = (id) => document.getElementById(id);
  const ANSWERS = { y: "yes", n: "no", u: "" };
  let items = [];
  let order = [];
  let reviewer = "";
  let answers = {};
  let place = 0;

  const key = () => `selfgap review ${facts.sample} ${reviewer}`;

  // A generator of random numbers with a seed (mulberry32), so that a reviewer's order is the same after a reload.
  function random(seed) {
    return () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
      return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
    };
  }

  function hash(text) {
    let value = 2166136261;
    for (const byte of new TextEncoder().encode(text)) value = Math.imul(value ^ byte, 16777619);
    return value;
  }

  function shuffled(count, seed) {
    const places = [...Array(count).keys()];
    const next = random(seed);
    for (let last = count - 1; last > 0; last -= 1) {
      const other = Math.floor(next() * (last + 1));
      [places[last], places[other]] = [places[other], places[last]];
    }
    return places;
  }

  // A browser may have no storage, or a full one. Reviewing works without it, until the page is closed.
  function keep(name, text) {
    try {
      localStorage.setItem(name, text);
      return true;
    } catch {
      return false;
    }
  }

  function kept(name) {
    try {
      return localStorage.getItem(name);
    } catch {
      return null;
    }
  }

  function begin(name) {
    reviewer = name;
    order = shuffled(items.length, hash(key()));
    try {
      answers = JSON.parse(kept(key()) || "{}");
    } catch {
      answers = {};
    }
    keep(`selfgap reviewer ${facts.sample}`, reviewer);
    place = order.findIndex((item) => !(items[item][0] in answers));
    if (place < 0) place = items.length;
    show();
  }

  function show() {
    const done = Object.keys(answers).length;
    at("start").hidden = true;
    at("done").hidden = place < items.length;
    at("judging").hidden = place >= items.length;
    if (place >= items.length) return;
    const [name, text, pixels] = items[order[place]];
    at("text").textContent = text;
    at("image").src = `review/images/${name}.png`;
    at("image").classList.toggle("pixels", pixels);
    at("bar").value = done;
    at("progress").textContent = `Image ${place + 1} of ${items.length}, ${done} judged, reviewer ${reviewer}`;
    for (const button of document.querySelectorAll("[data-verdict]")) {
      button.setAttribute("aria-pressed", String(name in answers && answers[name] === button.dataset.verdict));
    }
    at("back").disabled = place === 0;
    at("forward").disabled = !(name in answers);
    if (place + 1 < items.length) new Image().src = `review/images/${items[order[place + 1]][0]}.png`;
  }

  function answer(verdict) {
    answers[items[order[place]][0]] = verdict;
    const stored = keep(key(), JSON.stringify(answers));
    place += 1;
    show();
    if (!stored) at("progress").textContent = "This browser cannot keep your answers. Save them before you close the page.";
  }

  function move(by) {
    place = Math.max(0, Math.min(items.length, place + by));
    show();
  }

  const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

  function save() {
    const lines = items.filter(([name]) => name in answers).map(([name]) => `${name},${answers[name]},${quoted(reviewer)}`);
    const blob = new Blob([["candidate_id,verdict,reviewer", ...lines].join("\n") + "\n"], { type: "text/csv" });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${facts.run}-${facts.set}-${reviewer.replace(/[^\p{L}\p{N}.-]+/gu, "_")}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  at("who").addEventListener("submit", (event) => {
    event.preventDefault();
    // The browser takes the focus from a hidden field only with its next frame. Until then a key would be typed into it.
    event.target.elements.reviewer.blur();
    begin(event.target.elements.reviewer.value.trim());
  });
  for (const button of document.querySelectorAll("[data-verdict]")) {
    button.addEventListener("click", () => answer(button.dataset.verdict));
  }
  at("back").addEventListener("click", () => move(-1));
  at("forward").addEventListener("click", () => move(1));
  at("look-back").addEventListener("click", () => move(-1));
  at("export").addEventListener("click", save);
  at("export-done").addEventListener("click", save);
  at("leave").addEventListener("click", () => {
    keep(`selfgap reviewer ${facts.sample}`, "");
    at("judging").hidden = true;
    at("start").hidden = false;
    at("who").elements.reviewer.value = "";
    at("who").elements.reviewer.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input") || !at("start").hidden) return;
    const pressed = event.key.toLowerCase();
    if (pressed in ANSWERS && place < items.length && !event.repeat) answer(ANSWERS[pressed]);
    else if (event.key === "ArrowLeft") move(-1);
    else if (event.key === "ArrowRight" && place < items.length && items[order[place]][0] in answers) move(1);
    else if (pressed === "s") save();
  });

  return {
    sample: (data) => {
      items = data.map(([name, text, pixels]) => [name, text, Boolean(pixels)]);
      const last = kept(`selfgap reviewer ${facts.sample}`);
      if (last) begin(last);
    },
  };
})();
