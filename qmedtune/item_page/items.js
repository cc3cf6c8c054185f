"use strict";
// Lists the items of the page's data. All text goes in as text; nothing is asked of anyone.
(() => {
  const SIZE = 20, MANY_OPTIONS = 6;
  const PAIR = ["gained", "lost", "both right", "both wrong"], ONE = ["right", "wrong"];
  const tasks = JSON.parse(document.getElementById("data").textContent);
  const field = (name) => document.getElementById(name);
  const state = { task: 0, by: "options", facet: -1, order: "file", outcome: "all", first: 0 };

  const element = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const task = () => tasks[state.task];
  const outcomes = () => (task().labels.length === 2 ? PAIR : ONE);
  const percent = (share) => (share >= 995 ? ">99 %" : share < 10 ? "<1 %" : Math.round(share / 10) + " %");
  // An item is [id, facet, draw, gold, options or 0, answers]; an answer [value, chosen, shares, tie, written, value].
  const valueOf = (answer) => (state.by === "written" && answer[5] !== null ? answer[5] : answer[0]);
  const hasOptions = (shown) => shown.rows.some((row) => row[5][0][2].length);
  const hasWritten = (shown) => shown.rows.some((row) => row[5][0][4] !== null);

  function outcome(row) {
    const values = row[5].map(valueOf);
    if (values.length === 1) return values[0] >= 0.5 ? "right" : "wrong";
    if (values[1] > values[0]) return "gained";
    if (values[0] > values[1]) return "lost";
    return values[1] >= 0.5 ? "both right" : "both wrong";
  }
  const last = (row) => row[5][row[5].length - 1];
  const confidence = (answer) => (answer[2].length ? Math.max(...answer[2]) : 0);
  const goldShare = (answer, row) => (answer[2].length && row[3] >= 0 ? answer[2][row[3]] || 0 : valueOf(answer) * 1000);
  const moved = (row) => Math.abs(goldShare(last(row), row) - goldShare(row[5][0], row));
  const ORDERS = {
    file: ["as in the file", null],
    moved: ["largest change first", (a, b) => moved(b) - moved(a)],
    sure: ["surest first", (a, b) => confidence(last(b)) - confidence(last(a))],
    unsure: ["least sure first", (a, b) => confidence(last(a)) - confidence(last(b))],
    wrong: ["surest and wrong first", (a, b) => wrongness(b) - wrongness(a)],
  };
  const wrongness = (row) => (valueOf(last(row)) >= 0.5 ? 0 : 1000 + confidence(last(row)));

  function chosen(ignoring) {
    const words = field("search").value.trim().toLowerCase();
    return task().rows.filter((row) => {
      if (!ignoring && state.outcome !== "all" && outcome(row) !== state.outcome) return false;
      if (state.facet >= 0 && row[1] !== state.facet) return false;
      if (field("ties").checked && !row[5].some((answer) => answer[3])) return false;
      if (field("unread").checked && !row[5].some((answer) => answer[4] === "")) return false;
      if (!words) return true;
      const text = task().texts[row[0]];
      return (row[0] + " " + (text ? text[0].join(" ") + " " + text[1].join(" ") : "")).toLowerCase().includes(words);
    });
  }

  // ---- one item ------------------------------------------------------------------------------------------------

  const KIND = { gained: "good", lost: "poor", right: "good", wrong: "poor" };

  function head(row) {
    const line = element("header", "item-head"), said = outcome(row);
    line.append(element("span", "badge " + (KIND[said] || "even"), said), element("code", "id", row[0]));
    const more = [];
    if (row[1] >= 0) more.push(task().facets[row[1]]);
    if (task().rows.some((other) => other[2])) more.push("draw " + (row[2] + 1));
    if (row[5].some((answer) => answer[3])) more.push("near tie");
    if (row[5].some((answer) => answer[4] === "")) more.push("unread answer");
    for (const word of more) line.append(element("span", "also", word));
    return line;
  }

  function question(row) {
    const text = task().texts[row[0]], box = element("div");
    if (!text) return box;
    const [first, ...rest] = text[0];
    box.append(element("p", "question", first));
    if (rest.length) {
      const folded = element("details");
      folded.append(element("summary", "", rest.length === 1 ? "Passage" : rest.length + " passages"));
      for (const part of rest) folded.append(element("p", "passage", part));
      box.append(folded);
    }
    return box;
  }

  function bar(label, share, preferred) {
    const line = element("div", "share" + (preferred ? " preferred" : ""));
    const track = element("span", "track"), fill = element("i", label === "base" ? "c0" : "c3");
    fill.style.width = share / 10 + "%";
    track.append(fill);
    track.setAttribute("aria-hidden", "true");
    line.append(element("span", "who", label), track, element("span", "figure", percent(share)));
    return line;
  }

  function option(row, place, name, text) {
    const box = element("li", place === row[3] ? "option gold" : "option");
    const words = element("div", "words");
    words.append(element("span", "name", name));
    if (text) words.append(element("span", "", text));
    if (place === row[3]) words.append(element("span", "right-one", "right answer"));
    const bars = element("div", "bars-of");
    row[5].forEach((answer, number) => {
      if (answer[2].length) bars.append(bar(task().labels[number], answer[2][place] || 0, answer[1] === place));
    });
    box.append(words, bars);
    return box;
  }

  function options(row) {
    const names = row[4] || task().options, text = task().texts[row[0]], texts = text ? text[1] : [];
    const most = (place) => Math.max(...row[5].map((answer) => answer[2][place] || 0));
    const places = names.map((_, place) => place);
    const shown = places.length <= MANY_OPTIONS ? places
      : [...places].sort((a, b) => (b === row[3]) - (a === row[3]) || most(b) - most(a)).slice(0, MANY_OPTIONS);
    const list = element("ul", "options");
    for (const place of shown) list.append(option(row, place, names[place], texts[place]));
    const box = element("div");
    box.append(list);
    if (shown.length < places.length) {
      box.append(element("p", "note", `and ${places.length - shown.length} options that both find less likely`));
    }
    return box;
  }

  function written(row) {
    if (row[5].every((answer) => answer[4] === null)) return null;
    const names = row[4] || task().options, line = element("p", "written");
    line.append(element("span", "who", "in words: "));
    row[5].forEach((answer, number) => {
      if (number) line.append(" → ");
      const said = answer[4] === "" ? "unread" : typeof answer[4] === "number" ? names[answer[4]] : String(answer[4]);
      const score = task().measure === "right" ? "" : ` (${task().measure} ${answer[5].toFixed(2)})`;
      const right = answer[5] >= 0.5;
      const part = element("span", right ? "good" : "", `${task().labels[number]} ${said}${score}`);
      line.append(part);
      if (task().measure === "right" && right) line.append(element("span", "good", " ✓"), element("span", "unseen", " right"));
    });
    return line;
  }

  function item(row) {
    const box = element("article", "card item");
    box.append(head(row), question(row));
    if (row[5][0][2].length) box.append(options(row));
    const said = written(row);
    if (said) box.append(said);
    return box;
  }

  // ---- the list and its controls -------------------------------------------------------------------------------

  function list() {
    const found = chosen(false), order = ORDERS[state.order][1];
    if (order) found.sort(order);
    state.first = Math.min(state.first, Math.max(0, Math.floor((found.length - 1) / SIZE) * SIZE));
    const part = found.slice(state.first, state.first + SIZE);
    field("list").replaceChildren(...part.map(item));
    const asked = task().rows.length;
    field("told").textContent = found.length === asked ? `${asked.toLocaleString("en")} items`
      : `${found.length.toLocaleString("en")} of ${asked.toLocaleString("en")} items`;
    field("pager").hidden = found.length <= SIZE;
    field("where").textContent = `${state.first + 1} to ${state.first + part.length} of ${found.length}`;
    field("before").disabled = state.first === 0;
    field("after").disabled = state.first + SIZE >= found.length;
    counts();
  }

  function counts() {
    const found = { all: 0 };
    for (const row of chosen(true)) {
      found.all += 1;
      found[outcome(row)] = (found[outcome(row)] || 0) + 1;
    }
    for (const box of field("outcomes").querySelectorAll("input")) {
      box.nextElementSibling.lastElementChild.textContent = (found[box.value] || 0).toLocaleString("en");
    }
  }

  function choices(name, pairs, value) {
    field(name).replaceChildren(...pairs.map(([key, word]) => {
      const made = element("option", "", word);
      made.value = key;
      made.selected = key === value;
      return made;
    }));
  }

  function outcomeButtons() {
    field("outcomes").replaceChildren(...["all", ...outcomes()].map((name) => {
      const label = element("label", "pick"), box = element("input"), words = element("span");
      box.type = "radio";
      box.name = "outcome";
      box.value = name;
      box.checked = name === state.outcome;
      words.append(element("span", "", name), element("span", "count"));
      label.append(box, words);
      return label;
    }));
  }

  function open(number) {
    Object.assign(state, { task: number, facet: -1, outcome: "all", first: 0 });
    const shown = task(), both = hasOptions(shown) && hasWritten(shown);
    state.by = hasOptions(shown) ? "options" : "written";
    field("search").value = "";
    field("ties").checked = field("unread").checked = false;
    field("by-label").hidden = !both;
    choices("by", [["options", "the likelier option"], ["written", "what was written"]], state.by);
    field("facet-label").hidden = shown.facets.length < 2;
    choices("facet", [[-1, "all"], ...shown.facets.map((name, place) => [place, name])], -1);
    outcomeButtons();
    list();
  }

  choices("task", tasks.map((each, place) => [place, each.name]), 0);
  choices("order", Object.entries(ORDERS).map(([key, [word]]) => [key, word]), state.order);
  const changed = (change) => (event) => {
    change(event.target);
    state.first = 0;
    list();
  };
  field("task").addEventListener("change", (event) => open(Number(event.target.value)));
  field("by").addEventListener("change", changed((box) => { state.by = box.value; }));
  field("facet").addEventListener("change", changed((box) => { state.facet = Number(box.value); }));
  field("order").addEventListener("change", changed((box) => { state.order = box.value; }));
  field("outcomes").addEventListener("change", changed((box) => { state.outcome = box.value; }));
  for (const name of ["ties", "unread"]) field(name).addEventListener("change", changed(() => {}));
  field("search").addEventListener("input", changed(() => {}));
  field("controls").addEventListener("submit", (event) => event.preventDefault());
  const turn = (by) => () => {
    state.first += by;
    list();
    field("told").scrollIntoView({ block: "start" });
  };
  field("before").addEventListener("click", turn(-SIZE));
  field("after").addEventListener("click", turn(SIZE));
  field("controls").hidden = false;
  open(0);
})();
