// The watcher's page in the browser: asks for what changed and puts it in place; streams answers. Talks to nobody else.
"use strict";

const EVERY_MS = 2000;
const PATIENCE_MS = 8000;

// ---- live parts: {name: html} from the server, where all text was escaped; only what changed is replaced ------------

const live = document.querySelector("[data-live]");
const shown = new Map();
let tag = "";
let lastAnswer = Date.now();

function keepState(element) {
  const open = [...element.querySelectorAll("details")].map((part) => part.open);
  const ticked = new Set();
  for (const box of element.querySelectorAll("input[type=checkbox]:checked")) ticked.add(box.value);
  const focused = element.contains(document.activeElement) ? document.activeElement.id : "";
  return () => {
    const parts = [...element.querySelectorAll("details")];
    if (parts.length === open.length) parts.forEach((part, place) => (part.open = open[place]));
    for (const box of element.querySelectorAll("input[type=checkbox]")) box.checked = ticked.has(box.value);
    if (focused) document.getElementById(focused)?.focus();
  };
}

function place(parts) {
  for (const [name, html] of Object.entries(parts)) {
    if (shown.get(name) === html) continue;
    let element = live.querySelector(`[data-part="${CSS.escape(name)}"]`);
    if (!element) {
      element = document.createElement("div");
      element.dataset.part = name;
      live.append(element);
    }
    const restore = shown.has(name) || element.hasChildNodes() ? keepState(element) : () => {};
    element.innerHTML = html;
    restore();
    shown.set(name, html);
  }
}

async function refresh() {
  if (document.hidden) return;
  try {
    const answer = await fetch(live.dataset.live, {
      headers: tag ? { "If-None-Match": tag } : {},
      signal: AbortSignal.timeout(PATIENCE_MS),
      cache: "no-store",
    });
    if (answer.status === 200) {
      tag = answer.headers.get("ETag") ?? "";
      place(await answer.json());
    }
    lastAnswer = Date.now();
    document.getElementById("gone").hidden = true;
  } catch {
    const gone = document.getElementById("gone");
    const time = new Date(lastAnswer).toLocaleTimeString();
    gone.textContent = `qmedtune watch does not answer any more: this page is as it was at ${time}.`;
    gone.hidden = false;
  }
}

async function follow() {
  for (;;) {
    await refresh();
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

if (live) {
  document.addEventListener("visibilitychange", refresh);
  follow();
}

// ---- base and final side by side: lines of {"side", "text"} as they come ---------------------------------------------

const form = document.getElementById("ask");

function put(line) {
  const { side, text } = JSON.parse(line);
  const element = document.getElementById(side === "error" ? "asking" : side);
  if (element) element.textContent += text;
}

async function ask(event) {
  event.preventDefault();
  const button = form.querySelector("button");
  const status = document.getElementById("asking");
  for (const side of ["base", "final"]) document.getElementById(side).textContent = "";
  button.disabled = true;
  status.textContent = "Loading and answering …";
  try {
    const answer = await fetch(form.dataset.to, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ question: document.getElementById("question").value }),
    });
    status.textContent = answer.ok ? "" : `Not answered: ${answer.status}`;
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      if (answer.ok) lines.forEach(put);
    }
  } catch (error) {
    status.textContent = `The answer broke off: ${error.message}`;
  } finally {
    button.disabled = false;
  }
}

if (form) form.addEventListener("submit", ask);
