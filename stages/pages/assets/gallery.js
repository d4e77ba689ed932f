"use strict";
// The gallery. Data files are scripts that call selfgap.index, selfgap.texts and selfgap.prompt, because a page that is opened
// from disk may run scripts beside it, but not read other files. Everything from data becomes text, never HTML.
const selfgap = (() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const sets = new Map(facts.sets.map((set) => [set.name, set]));
  const form = document.getElementById("filters");
  const list = document.getElementById("prompts");
  const detail = document.getElementById("detail");
  const SIGNS = { y: "✓", n: "✗", u: "?", "-": "·" };
  const WORDS = { y: "yes", n: "no", u: "unreadable", "-": "not judged" };
  const POOL = {
    selected: (bits) => bits & 1,
    pool: (bits) => bits & 2,
    recovered: (bits) => bits & 4,
    waiting: (bits) => bits & 2 && !(bits & 4),
    unpaired: (bits) => bits & 8,
  };
  const indexes = new Map();
  const texts = new Map();
  const prompts = new Map();
  const loading = new Map();
  let drawn = 0; // counts renderings, so that a late one does not overwrite a newer one

  // Small helpers

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "class") made.className = value;
      else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value !== false) made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  function load(path) {
    if (!loading.has(path)) {
      const promise = new Promise((resolve, reject) => {
        const script = element("script", { src: path });
        script.addEventListener("load", () => (script.remove(), resolve()));
        script.addEventListener("error", () => (script.remove(), loading.delete(path), reject(new Error(path))));
        document.head.append(script);
      });
      loading.set(path, promise);
    }
    return loading.get(path);
  }

  const folder = (set) => `${facts.data}/${encodeURIComponent(set)}`;

  // The address: everything that is chosen is behind the #, so a link shows the same

  function chosen() {
    const state = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
    if (!sets.has(state.set)) state.set = facts.sets[0].name;
    return state;
  }

  function address(state) {
    const kept = Object.entries(state).filter(([key, value]) => value !== "" && !(key === "page" && value === "1"));
    return "#" + new URLSearchParams(kept).toString();
  }

  function go(changes) {
    location.hash = address({ ...chosen(), ...changes });
  }

  // Data

  function decode(data) {
    const width = 5 + data.judges.length;
    data.rows = data.prompts.map(([id, category, bits, codes], number) => {
      const images = [];
      for (let at = 0; at < codes.length; at += width) {
        const p = codes.slice(at + 2, at + 4);
        images.push({
          group: parseInt(codes.slice(at, at + 2), 36),
          p: p === "--" ? null : parseInt(p, 36) / 1000,
          said: codes.slice(at + 4, at + width),
        });
      }
      return { id, category, bits, images, number };
    });
    delete data.prompts;
    return data;
  }

  const disagree = (image) => image.said.includes("y") && image.said.includes("n");

  function imageTest(state, index) {
    const tests = [];
    if (state.model) tests.push((image) => index.groups[image.group] === state.model);
    if (state.own) tests.push((image) => image.said[0] === state.own);
    index.judges.forEach((judge, place) => {
      const wanted = state[`judge.${judge}`];
      if (wanted) tests.push((image) => image.said[place + 1] === wanted);
    });
    if (state.judges === "disagree") tests.push(disagree);
    if (state.judges === "agree") tests.push((image) => !disagree(image) && image.said.replace(/[^yn]/g, "").length > 1);
    return tests.length ? (image) => tests.every((test) => test(image)) : null;
  }

  function margin(images) {
    const ends = new Map();
    for (const { group, p } of images) {
      if (p === null) continue;
      const [low, high] = ends.get(group) || [p, p];
      ends.set(group, [Math.min(low, p), Math.max(high, p)]);
    }
    return Math.max(-1, ...[...ends.values()].map(([low, high]) => high - low));
  }

  function keys(images) {
    const known = images.map((image) => image.p).filter((p) => p !== null);
    return {
      "p-high": known.length ? -Math.max(...known) : 2,
      "p-low": known.length ? Math.min(...known) : 2,
      "margin-high": -margin(images),
      "margin-low": known.length ? margin(images) : 2,
      disagreement: images.length ? -images.filter(disagree).length / images.length : 0,
    };
  }

  function select(state, index) {
    const test = imageTest(state, index);
    const words = (state.search || "").toLocaleLowerCase().split(/\s+/).filter(Boolean);
    const lines = words.length ? texts.get(state.set) : null;
    const found = [];
    for (const row of index.rows) {
      if (state.subtask && index.categories[row.category] !== state.subtask) continue;
      if (POOL[state.pool] && !POOL[state.pool](row.bits)) continue;
      if (lines && !words.every((word) => row.id.startsWith(word) || lines[row.number].includes(word))) continue;
      const images = test ? row.images.filter(test) : row.images;
      if (test && !images.length) continue;
      found.push({ row, key: state.sort ? keys(images)[state.sort] : row.number });
    }
    found.sort((a, b) => a.key - b.key || a.row.number - b.row.number);
    return { rows: found.map((entry) => entry.row), test };
  }

  // Controls

  function options(field, values) {
    field.replaceChildren(...values.map(([value, label]) => element("option", { value }, label)));
  }

  const VERDICTS = [["", "any"], ["y", "yes"], ["n", "no"], ["u", "unreadable"], ["-", "not judged"]];

  function controls(state) {
    const set = sets.get(state.set);
    options(form.elements.set, facts.sets.map(({ name, prompts: count }) => [name, `${name} (${count})`]));
    options(form.elements.subtask, [["", "all"], ...set.categories.map((name) => [name, name])]);
    options(form.elements.model, [["", "all"], ...set.groups.map((name) => [name, name])]);
    options(form.elements.own, VERDICTS);
    document.getElementById("judges").replaceChildren(
      ...set.judges.map((judge) => {
        const field = element("select", { name: `judge.${judge}` });
        options(field, VERDICTS);
        return element("label", {}, `${judge} `, field);
      }),
    );
    document.getElementById("between").hidden = !set.judges.length;
    document.getElementById("pooled").hidden = !set.training;
    let active = 0;
    for (const field of form.querySelectorAll("select, input")) {
      field.value = state[field.name] || "";
      if (field.closest("#more") && state[field.name]) active += 1;
    }
    document.getElementById("active").textContent = active ? ` (${active} active)` : "";
  }

  // Prompts

  // large: as a picture of its own; otherwise within a card, which holds the thumbnails once, and a button that is described
  function picture(prompt, place, large) {
    const { columns, rows, pixels } = prompt.thumbnails;
    const share = (at, count) => (count > 1 ? (100 * at) / (count - 1) : 0);
    const spoken = large ? { role: "img", "aria-label": `image ${prompt.images[place].id}` } : {};
    const made = element("span", { class: pixels ? "picture pixels" : "picture", ...spoken });
    made.style.backgroundImage = large ? `url("${prompt.thumbnails.data}")` : "var(--thumbnails)";
    made.style.backgroundSize = `${100 * columns}% ${100 * rows}%`;
    made.style.backgroundPosition = `${share(place % columns, columns)}% ${share(Math.floor(place / columns), rows)}%`;
    return made;
  }

  const certain = (image) => (image.p === undefined ? "no p(yes)" : image.p.toFixed(2));

  function verdictOf(image, judge) {
    const found = image.said.find((entry) => entry.judge === judge);
    return found ? found.verdict : "-";
  }

  function thumbnail(prompt, place, set, dim) {
    const image = prompt.images[place];
    const group = set.groups[image.group];
    const verdicts = set.judges.map((judge) => verdictOf(image, judge));
    const marks = [];
    if (image.chosen) marks.push("chosen");
    if (image.rejected) marks.push("rejected");
    let frame = marks[0] || "";
    if (!set.training && set.judges.length) frame = { y: "right", n: "wrong" }[verdicts[0]] || "";
    const spoken = [
      `${group}, image ${image.index + 1}`, `p(yes) ${certain(image)}`, `own verdict ${WORDS[image.own]}`,
      ...set.judges.map((judge, at) => `${judge} ${WORDS[verdicts[at]]}`), ...marks,
    ].join(", ");
    return element(
      "button",
      { type: "button", class: `thumbnail ${frame}${dim ? " dim" : ""}`, "aria-label": spoken, "data-image": image.id,
        onclick: () => show(prompt, place, set) },
      picture(prompt, place),
      element("span", { class: "said" }, `${certain(image)} ${SIGNS[image.own]}`,
        set.judges.length ? ` | ${verdicts.map((verdict) => SIGNS[verdict]).join(" ")}` : ""),
      marks.length ? element("span", { class: `mark ${marks[0]}` }, marks.join(", ")) : null,
    );
  }

  const REASONS = {
    no_accepted: "no candidate accepted, so it went to the discard pool",
    no_rejected: "no candidate rejected, so there is no pair",
    small_margin: "the margin is too small for a pair",
  };

  function history(prompt) {
    const lines = prompt.history.map((entry) => {
      const parts = [];
      if (entry.rows) parts.push(`${entry.replay ? "recovered" : "selected"}, ${entry.rows} ${entry.rows > 1 ? "rows" : "row"}`);
      if (entry.margin !== undefined) parts.push(`margin ${entry.margin.toFixed(2)}`);
      if (entry.reason) parts.push(entry.replay && entry.reason === "no_accepted" ? "still not accepted" : REASONS[entry.reason] || entry.reason);
      if (entry.best !== undefined) parts.push(`best p(yes) ${entry.best.toFixed(2)}`);
      return element("li", {}, element("b", {}, entry.by), `: ${parts.join(", ") || "nothing selected"}`);
    });
    return lines.length ? element("ul", { class: "history" }, ...lines) : null;
  }

  function card(prompt, row, set, test, alone) {
    const groups = new Map();
    prompt.images.forEach((image, place) => {
      if (!groups.has(image.group)) groups.set(image.group, []);
      groups.get(image.group).push(thumbnail(prompt, place, set, test && !test(row.images[place])));
    });
    const link = address({ set: set.name, prompt: prompt.prompt_id });
    const facts = [prompt.category, prompt.difficulty, prompt.split].filter(Boolean).join(" · ");
    const made = element(
      "article",
      { class: `prompt${alone ? " alone" : ""}${set.training ? " training" : ""}`, "data-prompt": prompt.prompt_id },
      element("h2", { dir: "auto" }, prompt.prompt),
      element("p", { class: "quiet" }, `${facts} · `, element("a", { href: link, class: "permalink" }, `prompt ${prompt.prompt_id}`)),
      history(prompt),
      element("div", { class: "groups" }, ...[...groups].map(([group, images]) =>
        element("section", { class: "group", "aria-label": set.groups[group] },
          element("h3", {}, set.groups[group]), element("div", { class: "images" }, ...images)))),
    );
    made.style.setProperty("--thumbnails", `url("${prompt.thumbnails.data}")`);
    return made;
  }

  // One image with its ids

  function copied(text) {
    const button = element("button", { type: "button", class: "copy", onclick: async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(button.previousElementSibling); // the browser does not allow it: select it instead
      }
    } }, "copy");
    return element("span", { class: "id" }, element("code", {}, text), " ", button);
  }

  function show(prompt, place, set) {
    const image = prompt.images[place];
    const lines = [["drawn by", set.groups[image.group]], ["image of its prompt", `${image.index + 1}`]];
    lines.push(["p(yes)", image.p === undefined ? "none" : image.p.toFixed(4)], ["own verdict", WORDS[image.own]]);
    for (const entry of image.said) {
      const more = [WORDS[entry.verdict]];
      if (entry.score !== undefined) more.push(`score ${entry.score.toFixed(3)}`);
      if (entry.reason) more.push(entry.reason);
      lines.push([entry.judge, more.join(", ")]);
      if (entry.answer) lines.push([`${entry.judge} says`, entry.answer]);
    }
    for (const entry of image.others || []) {
      lines.push([`${entry.model} about it`, WORDS[entry.verdict] + (entry.p === undefined ? "" : `, p(yes) ${entry.p.toFixed(4)}`)]);
    }
    if (image.chosen) lines.push(["chosen by", image.chosen.join("; ")]);
    if (image.rejected) lines.push(["rejected by", image.rejected.join("; ")]);
    const name = image.tar.split("/").pop();
    const ids = [["candidate_id", image.id], ["prompt_id", prompt.prompt_id], ["seed", image.seed], ["checkpoint", image.checkpoint]];
    ids.push(["whole image", `tar -xf ../${image.tar} ${image.id}.png`]);
    const move = (by) => show(prompt, (place + by + prompt.images.length) % prompt.images.length, set);
    detail.replaceChildren(
      element("div", { class: "bar" },
        element("button", { type: "button", onclick: () => move(-1) }, "← Previous"),
        element("button", { type: "button", onclick: () => move(1) }, "Next →"),
        element("button", { type: "button", class: "close", onclick: () => detail.close(), autofocus: true }, "Close")),
      element("div", { class: "both" },
        picture(prompt, place, true),
        element("div", {},
          element("p", { class: "text", dir: "auto" }, prompt.prompt),
          element("dl", {}, ...lines.flatMap(([term, value]) => [element("dt", {}, term), element("dd", {}, value)]),
            ...ids.flatMap(([term, value]) => [element("dt", {}, term), element("dd", {}, copied(value))])),
          element("p", { class: "quiet" }, `The command is for the folder of this page; ${name} is the shard that holds the image.`))),
    );
    detail.onkeydown = (event) => {
      if (event.key === "ArrowLeft") move(-1);
      if (event.key === "ArrowRight") move(1);
    };
    history_replace({ ...chosen(), image: image.id });
    if (!detail.open) detail.showModal();
  }

  function history_replace(state) {
    window.history.replaceState(null, "", address(state));
  }

  if (detail) detail.addEventListener("close", () => history_replace({ ...chosen(), image: "" }));

  // Rendering

  function fail(path) {
    list.replaceChildren(element("p", { class: "notice" }, `${path} cannot be read. Make the pages again: python -m stages.browse results/${facts.run}`));
  }

  async function render() {
    const mine = ++drawn;
    const state = chosen();
    const set = sets.get(state.set);
    controls(state);
    try {
      if (!indexes.has(state.set)) await load(`${folder(state.set)}/index.js`);
      if (state.search && !texts.has(state.set)) await load(`${folder(state.set)}/texts.js`);
    } catch (error) {
      return fail(error.message);
    }
    const index = indexes.get(state.set);
    const found = select(state, index);
    const alone = state.prompt ? index.rows.find((row) => row.id === state.prompt) : null;
    const pages = Math.max(1, Math.ceil(found.rows.length / index.perPage));
    const page = Math.min(Math.max(1, parseInt(state.page, 10) || 1), pages);
    const shown = state.prompt ? (alone ? [alone] : []) : found.rows.slice((page - 1) * index.perPage, page * index.perPage);
    const key = (row) => `${state.set}/${row.id}`;
    try {
      await Promise.all(shown.filter((row) => !prompts.has(key(row))).map((row) => load(`${folder(state.set)}/${row.id.slice(0, 2)}/${row.id}.js`)));
    } catch (error) {
      return fail(error.message);
    }
    if (mine !== drawn) return;
    list.replaceChildren(...shown.map((row) => card(prompts.get(key(row)), row, set, state.prompt ? null : found.test, Boolean(state.prompt))));
    const all = element("a", { href: address({ set: state.set }) }, "show all prompts");
    const status = document.getElementById("status");
    if (state.prompt) status.replaceChildren(alone ? "One prompt; " : `${state.set} has no prompt ${state.prompt}; `, all);
    else status.replaceChildren(`${found.rows.length} of ${index.rows.length} prompts`);
    document.getElementById("legend").textContent =
      `Below each image: the model's own p(yes) and verdict (${SIGNS.y} yes, ${SIGNS.n} no, ${SIGNS.u} unreadable, ${SIGNS["-"]} not judged)` +
      (set.judges.length ? `, then the verdict of ${set.judges.join(", ")}.` : ".") +
      (set.training ? " Solid frame: chosen for training; dashed: rejected." : set.judges.length ? ` Solid frame: ${set.judges[0]} says that it matches; dashed: that it does not.` : "") +
      (set.lost ? ` ${set.lost} images could not be read.` : "");
    const paging = document.getElementById("paging");
    paging.hidden = Boolean(state.prompt) || pages === 1;
    document.getElementById("place").textContent = `Page ${page} of ${pages}`;
    document.getElementById("previous").disabled = page === 1;
    document.getElementById("next").disabled = page === pages;
    list.dataset.page = page;
    list.dataset.ready = mine;
    if (state.image && alone) {
      const prompt = prompts.get(key(alone));
      const place = prompt.images.findIndex((image) => image.id === state.image);
      if (place >= 0 && !detail.open) show(prompt, place, set);
    }
    if (prompts.size > 400) {
      for (const id of [...prompts.keys()].filter((id) => !shown.some((row) => key(row) === id))) prompts.delete(id);
      loading.clear();
    }
  }

  const turn = (by) => {
    go({ page: String((parseInt(list.dataset.page, 10) || 1) + by) });
    scrollTo(0, 0);
  };

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", (event) => {
    const { name, value } = event.target;
    if (name === "set") location.hash = address({ set: value });
    else go({ [name]: value, page: "", prompt: "", image: "" });
  });
  document.getElementById("clear").addEventListener("click", () => (location.hash = address({ set: chosen().set, sort: chosen().sort || "" })));
  document.getElementById("previous").addEventListener("click", () => turn(-1));
  document.getElementById("next").addEventListener("click", () => turn(1));
  document.addEventListener("keydown", (event) => {
    if (detail.open || event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select, textarea")) return;
    if (event.key === "ArrowRight" && !document.getElementById("paging").hidden && !document.getElementById("next").disabled) turn(1);
    if (event.key === "ArrowLeft" && !document.getElementById("paging").hidden && !document.getElementById("previous").disabled) turn(-1);
  });
  window.addEventListener("hashchange", render);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("more").open = matchMedia("(min-width: 60em)").matches;
    render();
  });

  return {
    index: (data) => indexes.set(data.set, decode(data)),
    texts: (data) => texts.set(data.set, data.texts.map((text) => text.toLocaleLowerCase())),
    prompt: (data) => prompts.set(`${data.set}/${data.prompt_id}`, data),
  };
})();
