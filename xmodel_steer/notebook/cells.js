// Grids of clickable cells, one for each kind of patch, with the tokens of two prompts above them. No build step.

const BLUE = [94, 60, 153], RED = [230, 97, 1]; // PuOr's ends, as in plots.patching

function colour(value, bound) {
  if (value === null) return "transparent";
  const share = Math.min(1, Math.abs(value) / bound);
  const end = value < 0 ? BLUE : RED;
  return `rgba(${end.join(",")},${(0.06 + 0.94 * share).toFixed(3)})`;
}

function element(tag, text, title) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (title) made.title = title;
  return made;
}

function render({ model, el }) {
  let anchor = null; // where a range begins
  let armed = null; // a token of the text that is read, to be paired with the next one that is clicked
  el.classList.add("xs-cells");

  const selected = () => model.get("selected");
  const select = (kind, cells) => {
    model.set("selected", { kind, cells });
    model.save_changes();
  };

  function click(event, kind, row, column) {
    const old = selected().kind === kind ? selected().cells : [];
    if (event.shiftKey && anchor && anchor.kind === kind) {
      const cells = [];
      for (let r = Math.min(row, anchor.row); r <= Math.max(row, anchor.row); r++)
        for (let c = Math.min(column, anchor.column); c <= Math.max(column, anchor.column); c++) cells.push([r, c]);
      return select(kind, cells);
    }
    anchor = { kind, row, column };
    if (!(event.ctrlKey || event.metaKey)) return select(kind, [[row, column]]);
    const rest = old.filter(([r, c]) => r !== row || c !== column);
    select(kind, rest.length < old.length ? rest : [...rest, [row, column]]);
  }

  function pair(read, place) {
    const kept = model.get("pairs").filter(([a, b]) => a !== read && b !== place);
    model.set("pairs", [...kept, [read, place]]);
    model.save_changes();
  }

  function tokens() {
    const line = element("div");
    line.className = "xs-tokens";
    const pairs = model.get("pairs");
    for (const [name, side] of [["read", 0], ["patched", 1]]) {
      const row = element("div");
      row.append(element("span", model.get("labels")[side]));
      model.get(name).forEach((token, k) => {
        const mine = pairs.filter((each) => each[side] === k);
        const other = model.get(side ? "read" : "patched");
        const said = mine.length ? `pairs with ${mine[0][1 - side]} ${other[mine[0][1 - side]]}` : "pairs with no token";
        const button = element("button", token, `position ${k}, ${said}; click a token of each text to pair them`);
        button.dataset.side = name;
        button.style.opacity = mine.length ? 1 : 0.45;
        if (side === 0 && armed === k) button.classList.add("armed");
        button.onclick = () => {
          if (side === 0) armed = armed === k ? null : k;
          else if (armed !== null) {
            pair(armed, k);
            armed = null;
          }
          draw();
        };
        row.append(button);
      });
      line.append(row);
    }
    return line;
  }

  function grid(kind) {
    const box = element("div");
    box.append(element("b", model.get("titles")[kind]));
    const table = element("table");
    const values = model.get("values")[kind], rows = model.get("rows"), names = model.get("patched");
    const chosen = selected().kind === kind ? selected().cells : [];
    for (let r = rows.length - 1; r >= 0; r--) {
      const line = element("tr");
      line.append(element("th", rows[r]));
      names.forEach((token, c) => {
        const value = values[r][c];
        const cell = element("td", "", `${rows[r]}, position ${c} ${token}: ${value === null ? "no value" : value.toFixed(3)}`);
        cell.dataset.cell = `${kind} ${r} ${c}`;
        cell.tabIndex = 0;
        cell.style.background = colour(value, model.get("bound"));
        if (chosen.some(([a, b]) => a === r && b === c)) cell.classList.add("chosen");
        cell.onclick = (event) => click(event, kind, r, c);
        cell.onkeydown = (event) => event.key === "Enter" && click(event, kind, r, c);
        line.append(cell);
      });
      table.append(line);
    }
    const foot = element("tr");
    foot.append(element("th", ""));
    names.forEach((token) => {
      const cell = element("td");
      cell.className = "xs-foot";
      cell.append(element("span", token));
      foot.append(cell);
    });
    table.append(foot);
    box.append(table);
    return box;
  }

  function draw() {
    const grids = element("div");
    grids.className = "xs-grids";
    for (const kind of Object.keys(model.get("values"))) grids.append(grid(kind));
    el.replaceChildren(tokens(), grids);
  }

  for (const name of ["values", "selected", "pairs", "patched", "read", "rows", "bound", "titles"])
    model.on(`change:${name}`, draw);
  draw();
}

export default { render };
