// Elements with attributes and children; text goes in as text, so that no name is ever read as markup.

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
}

const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const ruler = document.createElement("canvas").getContext("2d");
function textWidth(text, font) {
  ruler.font = `${font} ${getComputedStyle(document.body).fontFamily}`;
  return ruler.measureText(text).width;
}

const clipped = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);

// Tabs as the ARIA practices describe them: one is in the tab order, arrow keys walk, Home and End jump.
function tabs(list, chosen) {
  const all = () => [...list.querySelectorAll("[role=tab]")];
  const choose = tab => {
    for (const other of all()) {
      other.setAttribute("aria-selected", other === tab);
      other.tabIndex = other === tab ? 0 : -1;
    }
    chosen(tab);
  };
  list.addEventListener("click", event => {
    const tab = event.target.closest("[role=tab]");
    if (tab) choose(tab);
  });
  list.addEventListener("keydown", event => {
    const every = all(), here = every.indexOf(event.target);
    const places = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: every.length - 1 };
    if (!(event.key in places)) return;
    event.preventDefault();
    const tab = every[(places[event.key] + every.length) % every.length];
    tab.focus();
    choose(tab);
  });
  return choose;
}
