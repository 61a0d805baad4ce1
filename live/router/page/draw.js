// Tables whose rows keep their elements from one snapshot to the next, and lines of the last minute. What they are
// given is put in as text, never as HTML.

export const HISTORY_S = 60;

export const $ = (id) => document.getElementById(id);

export function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function marked([mark, kind], text) {
  return { mark, kind, text };
}

// A cell is a text; or an object of a text and, as it needs them, a mark before it, the kind of that mark, a share for
// the bar behind it, and a class.
function paint(cell, what) {
  const { text, mark, kind, share, name } = typeof what === "string" ? { text: what } : what;
  const shape = mark ? "mark" : share === undefined ? "text" : "bar";
  if (cell.dataset.shape !== shape) {
    cell.dataset.shape = shape;
    cell.replaceChildren(...PARTS[shape]());
  }
  cell.classList.toggle("chosen", name === "chosen");
  if (shape === "text") return put(cell, text);
  if (shape === "mark") {
    cell.firstChild.setAttribute("class", kind);
    put(cell.firstChild, mark);
    return put(cell.lastChild, ` ${text}`);
  }
  put(cell.firstChild, text);
  cell.lastChild.lastChild.setAttribute("width", String(100 * Math.min(1, Math.max(0, share))));
}

const PARTS = {
  text: () => [],
  mark: () => {
    const mark = document.createElement("span");
    mark.setAttribute("aria-hidden", "true");
    return [mark, document.createElement("span")];
  },
  bar: () => {
    const svg = shape("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
    for (const name of ["room", "used"]) svg.append(shape("rect", { class: name, width: "100", height: "10" }));
    return [document.createElement("span"), svg];
  },
};

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Rows keep their elements, so that focus, selection and scrolling survive the next snapshot.
export function fill(id, rows, numbers, nothing) {
  const body = $(id).tBodies[0];
  if (!rows.length) return sayNothing(body, $(id), nothing);
  if (body.dataset.empty) body.replaceChildren();
  delete body.dataset.empty;
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, at) => {
    const row = body.rows[at] ?? newRow(body, cells.length, numbers);
    cells.forEach((what, k) => paint(row.cells[k], what));
  });
}

function newRow(body, cells, numbers) {
  const row = body.insertRow();
  for (let k = 0; k < cells; k++) {
    const cell = row.appendChild(document.createElement(k ? "td" : "th"));
    if (!k) cell.scope = "row";
    if (numbers.includes(k)) cell.className = "number";
  }
  return row;
}

function sayNothing(body, table, nothing) {
  if (body.dataset.empty) return;
  body.dataset.empty = "yes";
  body.replaceChildren();
  const cell = body.insertRow().insertCell();
  cell.className = "empty";
  cell.colSpan = [...table.tHead.rows[0].cells].reduce((sum, head) => sum + head.colSpan, 0);
  cell.append(...nothing());
}

// Draws a value over the last minute; a pause breaks the line. `label` words its least and its greatest value.
export function line(id, history, value, label) {
  const points = history.map((past) => [past.time_s, value(past)]);
  const values = points.map((point) => point[1]).filter((y) => y != null);
  const top = Math.max(...values, 0);
  const now = history.at(-1).time_s;
  let path = "";
  let last = -Infinity;
  for (const [time, y] of points) {
    if (y == null) continue;
    const x = 100 * (1 - (now - time) / HISTORY_S);
    path += `${time - last < 3 ? "L" : "M"}${x.toFixed(1)} ${(19 - (top ? (18 * y) / top : 0)).toFixed(1)}`;
    last = time;
  }
  const svg = $(`${id}-line`);
  if (!svg.firstChild) {
    svg.setAttribute("viewBox", "0 0 100 20");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.append(shape("path", {}));
  }
  svg.firstChild.setAttribute("d", path);
  put($(`${id}-axis`), values.length ? label(Math.min(...values), top) : "");
}
