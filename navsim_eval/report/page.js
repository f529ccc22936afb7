// The scenes of a report: one bar of filters for pictures and table. Data: see browser.py. No library, no network.
"use strict";
document.documentElement.classList.add("js");
const data = JSON.parse(document.getElementById("data").textContent);
const cards = [...document.querySelectorAll(".scene")];
const rowOf = new Map(data.token.map((token, row) => [token, row]));
const picture = new Map(cards.map(card => [card.id, card]));
const field = name => document.getElementById("filter-" + name);
const state = { gallery: "", run: data.focus, sort: "score", down: false, shown: 100 };

// --- which scenes ---------------------------------------------------------------------------------------------------

function passes(row) {
  const speed = data.speed[row], [low, high] = (field("speed").value || "0,Infinity").split(",").map(Number);
  const text = field("text").value.trim().toLowerCase();
  return (!field("map").value || data.maps[data.map[row]] === field("map").value)
      && (!field("command").value || data.commands[data.command[row]] === field("command").value)
      && speed >= low && speed < high
      && (!text || data.token[row].includes(text) || data.logs[data.log[row]].toLowerCase().includes(text));
}

function fails(row, column) {  // of the planner in the table
  const run = data.runs[state.run], index = run.columns.indexOf(column);
  return index < 0 || (run.values[index][row] !== null && run.values[index][row] < (data.low[column] ?? 1));
}

function selected() {
  const chosen = data.runs[data.focus].columns.includes(state.gallery) ? row => fails(row, state.gallery) : () => true;
  return data.token.map((_, row) => row).filter(row => passes(row) && chosen(row));
}

// --- showing them ---------------------------------------------------------------------------------------------------

function show() {
  for (const card of cards) {
    const row = rowOf.get(card.id), tags = card.dataset.galleries.split(" ");
    card.hidden = !passes(row) || (state.gallery !== "" && !tags.includes(state.gallery));
  }
  for (const button of document.querySelectorAll("#filters button"))
    button.setAttribute("aria-pressed", button.dataset.gallery === state.gallery);
  const rows = selected(), drawn = cards.filter(card => !card.hidden).length;
  document.getElementById("count").textContent =
    `${rows.length} of ${data.token.length} scenes, ${drawn} ${drawn === 1 ? "picture" : "pictures"}`;
  fill(rows);
}

function cell(text, kind = "") {
  const made = document.createElement("td");
  made.textContent = text;
  made.className = kind;
  made.title = text;
  return made;
}

function fill(rows) {
  const run = data.runs[state.run], facts = ["log", "map", "command"].filter(name => data[name + "s"].length > 1);
  const names = ["token", ...facts, "m/s", ...run.columns];
  const plain = { token: data.token, "m/s": data.speed };
  const listed = { log: [data.log, data.logs], map: [data.map, data.maps], command: [data.command, data.commands] };
  const at = (name, row) => name in plain ? plain[name][row]
    : name in listed ? listed[name][1][listed[name][0][row]] : run.values[run.columns.indexOf(name)][row];
  if (!names.includes(state.sort)) state.sort = "score";
  const compare = (a, b) => a === b ? 0 : a === null ? 1 : b === null ? -1 : (a < b ? -1 : 1) * (state.down ? -1 : 1);
  rows.sort((a, b) => compare(at(state.sort, a), at(state.sort, b)));

  const head = document.createElement("tr");
  names.forEach((name, index) => {
    const made = document.createElement("th");
    made.textContent = name;
    made.title = run.titles[run.columns.indexOf(name)] ?? "";
    if (index <= facts.length) made.className = "text";
    if (name === state.sort) made.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    made.onclick = () => { state.down = state.sort === name && !state.down; state.sort = name; show(); };
    head.append(made);
  });
  const body = rows.slice(0, state.shown).map(row => {
    const made = document.createElement("tr"), token = document.createElement("code");
    token.textContent = data.token[row];
    const first = cell("", "text");
    if (picture.has(data.token[row])) {
      const link = document.createElement("a");
      link.href = "#" + data.token[row];
      link.title = "to its picture";
      link.append(token, " ▣");
      first.append(link);
    } else first.append(token);
    made.append(first, ...facts.map(name => cell(at(name, row), "text " + name)));
    made.append(cell(data.speed[row].toFixed(1)));
    for (const name of run.columns) {
      const value = at(name, row), kind = value === null ? "" : value === 0 ? "zero" : value < (data.low[name] ?? 1) ? "partly" : "";
      made.append(cell(value === null ? "—" : (100 * value).toFixed(0), kind));
    }
    return made;
  });
  const table = document.getElementById("scenes");
  table.tHead.replaceChildren(head);
  table.tBodies[0].replaceChildren(...body);
  document.getElementById("more").hidden = rows.length <= state.shown;
}

// --- what a reader does ---------------------------------------------------------------------------------------------

for (const button of document.querySelectorAll("#filters button"))
  button.onclick = () => { state.gallery = button.dataset.gallery; state.shown = 100; show(); };
for (const name of ["map", "command", "speed", "text"])
  field(name).oninput = () => { state.shown = 100; show(); };
field("run").onchange = () => { state.run = Number(field("run").value); show(); };
document.getElementById("more").onclick = () => { state.shown += 500; show(); };
for (const card of cards) {
  card.tabIndex = 0;
  card.onclick = event => event.target.closest("a, table") || card.classList.toggle("open");
  card.onkeydown = event => event.key === "Enter" && event.target === card && card.classList.toggle("open");
}

function follow() {  // a link to a scene opens its picture; "#map=…&command=…&gallery=NC" sets filters
  const hash = decodeURIComponent(location.hash.slice(1)), card = picture.get(hash);
  if (card) {
    for (const name of ["map", "command", "speed", "text"]) field(name).value = "";
    state.gallery = "";
    show();
    card.classList.add("open");
    card.scrollIntoView();
  } else if (hash.includes("=")) {
    for (const [name, value] of new URLSearchParams(hash)) {
      if (name === "gallery") state.gallery = value;
      else if (field(name)) field(name).value = value;
    }
    show();
  }
}
addEventListener("hashchange", follow);
show();
follow();
