"use strict";
const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

// Sorting: up, down, and back to the order of the report; what was not measured stays last.
function keyOf(row, column, numeric) {
  const cell = row.rows[0].cells[column];
  if (!numeric) return cell.textContent.trim() || null;
  return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
}

function sort(table, heads, column, direction, rows) {
  const numeric = heads[column].classList.contains("number");
  const sorted = rows.map((row) => ({ row, key: direction ? keyOf(row, column, numeric) : null }));
  if (direction) {
    sorted.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
      return direction * (numeric ? Math.sign(a.key - b.key) || 0 : collator.compare(a.key, b.key));
    });
  }
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  if (direction) heads[column].setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
  table.append(...sorted.map((found) => found.row));
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...table.tBodies];
  heads.forEach((head, column) => {
    const next = { ascending: -1, descending: 0 };
    head.querySelector("button")?.addEventListener("click", () => {
      sort(table, heads, column, next[head.getAttribute("aria-sort")] ?? 1, rows);
    });
  });
}

// Filtering: every word must be in the row; a menu must match exactly.
function makeFilterable(tools) {
  const table = document.getElementById(`table-${tools.dataset.table}`);
  const rows = [...table.tBodies].map((row) => ({ row, text: row.rows[0].textContent.toLowerCase() }));
  const [input, menus] = [tools.querySelector("input"), [...tools.querySelectorAll("select")]];
  const output = tools.querySelector("output");
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { row, text } of rows) {
      const fits = words.every((word) => text.includes(word))
        && menus.every((menu) => !menu.value || row.dataset[menu.dataset.of] === menu.value);
      row.hidden = !fits;
      shown += fits;
    }
    const all = `${rows.length.toLocaleString("en")} ${rows.length === 1 ? "row" : "rows"}`;
    output.textContent = shown === rows.length ? all : `${shown.toLocaleString("en")} of ${all}`;
  };
  input.addEventListener("input", filter);
  tools.addEventListener("change", filter);
  filter();
}

// Copying: a page from a file may lack the clipboard's interface.
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.className = "unseen";
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

async function copy(button) {
  const done = await copied(button.closest("tr").querySelector(".command code").textContent);
  const said = done ? "copied" : "not copied";
  button.focus({ preventScroll: true });
  button.textContent = document.getElementById("said").textContent = said;
  clearTimeout(button.timer);
  button.timer = setTimeout(() => {
    button.textContent = "copy";
    document.getElementById("said").textContent = "";
  }, 2000);
}

function unfold(button) {
  const open = button.getAttribute("aria-expanded") !== "true";
  button.setAttribute("aria-expanded", String(open));
  document.getElementById(button.getAttribute("aria-controls")).hidden = !open;
}

function openTarget() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let part = target; part; part = part.parentElement) if (part instanceof HTMLDetailsElement) part.open = true;
}

document.querySelectorAll("table").forEach(makeSortable);
document.querySelectorAll(".tools[data-table]").forEach(makeFilterable);
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.classList.contains("copy")) copy(button);
  if (button?.classList.contains("unfold")) unfold(button);
});
addEventListener("hashchange", openTarget);
addEventListener("beforeprint", () => document.querySelectorAll("main details.part, #provenance details").forEach((part) => { part.open = true; }));
openTarget();
