"use strict";
// The dump: its values unpacked, and what is looked up in them.

const NOTHING = {
  line: "", facts: "", target: "", kind: "", layer: "", source: "", args: [], fused: [], covers: [], inputs: [],
  constant: false, integer: false, crossing: false, region: null, output: null, group: "", bits: null,
  sensitivity: null, reason: "", rule: "", refusal: "", kernel: "", macs: 0, sqnr_db: null, milliseconds: null,
  before: null, after: null,
};

const views = (() => {
  const { shared, values, stages } = JSON.parse(document.getElementById("dump").textContent);
  for (const view of stages) {
    for (const node of view.nodes)
      for (const field of shared) if (field in node) node[field] = values[node[field]];
    view.nodes = view.nodes.map(node => ({ ...NOTHING, ...node }));
    view.byName = new Map(view.nodes.map(node => [node.name, node]));
    view.readers = new Map(view.nodes.map(node => [node.name, []]));
    view.edges = [];
    for (const node of view.nodes) {
      node.reads = [...new Set(node.args)].filter(name => view.byName.has(name));
      for (const name of node.reads) {
        view.edges.push([name, node.name]);
        view.readers.get(name).push(node.name);
      }
    }
  }
  return stages;
})();

const stageNames = [...new Set(views.map(view => view.stage))];
const partNames = [...new Set(views.map(view => view.graph))];
const viewAt = (stage, part) => views.find(view => view.stage === stage && view.graph === part);

// Calls where they are met first, by part and name: a kernel tells by their names which ones it covers.
const calls = new Map();
for (const view of views)
  for (const node of view.nodes)
    if (node.op === "call_function" && !calls.has(`${view.graph}\n${node.name}`))
      calls.set(`${view.graph}\n${node.name}`, node);
const callOf = (view, name) => calls.get(`${view.graph}\n${name}`);

function operatorOf(view, node) {
  if (node.covers.length)
    return node.covers.map(name => callOf(view, name)?.target ?? name).join(" + ");
  const ends = { placeholder: "input", output: "output", get_attr: "constant" };
  return ends[node.op] ?? node.target.replace(/^qfx\./, "");
}

// What the operand is called that a node reads in a place: a kernel has the operands of the first call that it covers,
// under the name that they have in the first stage where there are so many (a folded batch norm makes a bias).
function operandOf(view, node, i) {
  const named = name => views.filter(other => other.graph === view.graph)
    .map(other => other.byName.get(name)?.args[i]).find(found => found !== undefined);
  return (node.covers.length ? named(node.covers[0]) : node.args[i]) ?? `operand ${i + 1}`;
}

// "conv1" of layer1.0.conv1; a number tells nothing without the name before it.
function shortLayer(node) {
  const parts = node.layer.split(".");
  const last = parts.slice(-1)[0];
  return /^\d+$/.test(last) && parts.length > 1 ? parts.slice(-2).join(".") : last;
}

function classOf(node) {
  if (node.op === "placeholder" || node.op === "output") return "end";
  if (node.constant) return "constant";
  return node.crossing ? "crossing" : node.integer ? "integer" : "float";
}

// W4A8: the bits of the weight and of the data that is read.
function badgeOf(node) {
  if (node.constant || !node.integer) return node.bits === null ? "" : `W${node.bits}`;
  if (node.crossing) return node.output ? `A${node.output.bits}` : "";
  const read = node.inputs.find(known => known !== null) ?? node.output;
  return (node.bits === null ? "" : `W${node.bits}`) + (read ? `A${read.bits}` : "");
}

// The node of another stage that stands for the same: by name, by what a kernel covers, by layer.
function counterpart(view, node) {
  const stands = name => view.byName.get(name) ?? view.nodes.find(other => other.covers.includes(name));
  for (const name of [node.name, ...[...node.covers].reverse()]) {
    const found = stands(name);
    if (found) return found;
  }
  return node.layer ? view.nodes.find(other => other.layer === node.layer && other.constant === node.constant) : undefined;
}

const finite = value => (typeof value === "number" ? value : null);
const shownDb = value => (value === "inf" ? "exact" : typeof value === "number" ? `${value.toFixed(1)} dB` : String(value));
const short = value => (typeof value === "number" ? String(Number(value.toPrecision(4))) : String(value));
const shownMs = value => (value >= 10 ? value.toFixed(1) : value >= 0.1 ? value.toFixed(2) : value.toFixed(3)) + " ms";
