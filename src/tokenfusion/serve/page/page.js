// One image a request, a few at once; what goes wrong is said beside the image.
const AT_ONCE = 4, RETRIES = 20, TOPK = 5;
const LOST = 3; // a worker that dies loses what it was answering; another takes its place meanwhile
const $ = (id) => document.getElementById(id);
const cards = [];
const waiting = [];
let model = null, running = 0, token = "";

class Told extends Error {
  constructor(message, again = true) {
    super(message);
    this.again = again; // whether the same file may fare better
  }
}

async function ask(address, options = {}) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  for (let tried = 0, lost = 0; ; tried++) {
    let answer;
    try {
      answer = await fetch(address, { ...options, headers: { ...options.headers, ...headers } });
    } catch {
      if (++lost < LOST) {
        await new Promise((go) => setTimeout(go, 500));
        continue;
      }
      throw new Told("The service cannot be reached. Is it running, and is the network there?");
    }
    if (answer.ok) return answer;
    if (answer.status === 429 && tried < RETRIES) {
      const seconds = Number(answer.headers.get("Retry-After")) || 1;
      await new Promise((go) => setTimeout(go, 1000 * seconds * (0.5 + Math.random())));
      continue;
    }
    if (answer.status === 401) $("token-form").hidden = false;
    const { error } = await answer.json().catch(() => ({ error: null }));
    const value = error?.value === "the image" ? "" : `${error?.value}: `;
    const said = error ? `${value}${error.reason}; ${error.remedy}` : `The service answered ${answer.status}.`;
    throw new Told(said, ![413, 415, 422].includes(answer.status));
  }
}

async function connect() {
  try {
    model = await (await ask("v1/model")).json();
  } catch (error) {
    $("about").textContent = error.message;
    return;
  }
  $("token-form").hidden = true;
  const held = model.calibration.held_out_images;
  const trust = held ? `scores are calibrated on ${held.toLocaleString("en")} images` : "scores are not calibrated";
  const names = model.classes.slice(0, 12).join(", ") + (model.classes.length > 12 ? ", …" : "");
  $("about").textContent = `${model.name} knows ${model.classes.length} classes: ${names}; ${trust}.`;
  $("abstain").parentElement.hidden = !held && !$("abstain").value; // what was chosen stays, and can be changed
  for (const option of $("abstain").options) {
    option.disabled = option.value in model.calibration.not_promised; // with it nothing at all would be answered
    option.textContent = option.textContent.replace(" (cannot be promised)", "") + (option.disabled ? " (cannot be promised)" : "");
  }
}

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

function add(files) {
  for (const file of files) {
    const item = $("card").content.firstElementChild.cloneNode(true);
    item.tabIndex = -1; // where the focus goes when its button has gone
    const card = { file, item, answer: item.querySelector(".answer"), name: file.name || "pasted image", found: null };
    const thumbnail = item.querySelector("img");
    thumbnail.src = card.url = URL.createObjectURL(file);
    thumbnail.onerror = () => thumbnail.replaceWith(element("div", "no picture", "thumbnail"));
    item.querySelector("h2").textContent = card.name;
    $("cards").append(item);
    cards.push(card);
    send(card);
  }
}

function send(card) {
  card.found = null;
  show(card, element("p", "waiting …", "state"));
  waiting.push(card);
  progress();
  next();
}

function next() {
  while (running < AT_ONCE && waiting.length) {
    running++;
    judge(waiting.shift()).finally(() => { running--; progress(); next(); });
  }
}

async function judge(card) {
  try {
    if (!model) await connect();
    if (model && card.file.size > model.limits.bytes) {
      throw new Told(`${size(card.file.size)} are more than the ${size(model.limits.bytes)} that are taken; give a smaller image`, false);
    }
    const abstain = $("abstain").value ? `&abstain=${$("abstain").value}` : "";
    const type = card.file.type.startsWith("image/") ? card.file.type : "application/octet-stream";
    const asked = { method: "POST", body: card.file, headers: { "Content-Type": type } };
    const answer = await ask(`v1/predict?topk=${TOPK}${abstain}`, asked);
    card.by = answer.headers.get("X-Model-SHA256");
    if (card.by !== model?.sha256) await connect(); // the service has loaded another classifier
    card.found = await answer.json();
    show(card, ...answered(card));
  } catch (error) {
    if (!(error instanceof Told)) console.error(error);
    const said = error instanceof Told ? error.message : "This file cannot be read any more; choose it again";
    card.found = { error: said };
    const alert = element("p", said, "error");
    alert.setAttribute("role", "alert");
    if (error.again === false) return show(card, alert);
    const again = element("button", "Try again");
    again.setAttribute("aria-label", `Try ${card.name} again`);
    again.onclick = () => { send(card); card.item.focus(); };
    show(card, alert, again);
  }
}

function show(card, ...parts) {
  card.answer.replaceChildren(card.answer.querySelector("h2"), ...parts);
}

const size = (bytes) => (bytes < 2 ** 20 ? `${Math.round(bytes / 2 ** 10)} KB` : `${(bytes / 2 ** 20).toFixed(1)} MB`);
const percent = (score) => `${(100 * score).toFixed(1)}\u00a0%`;

function answered(card) {
  const { label, labels, unsure, score, topk } = card.found, parts = [];
  const known = card.by === model?.sha256 ? model : null; // of another classifier nothing is said
  if (labels) {
    parts.push(element("p", labels.length ? labels.map((one) => one.label).join(", ") : "none of these", "named"));
    if (unsure?.length) parts.push(element("p", `Not sure about: ${unsure.join(", ")}`, "note"));
  } else {
    parts.push(element("p", label === null ? "none of these" : label, "named"));
    const judged = known?.calibration.held_out_images;
    const right = judged
      ? `Of images like the ${judged} it was judged by, ${score > 0.999 ? "more than 99.9\u00a0%" : `about ${percent(score)}`} of such answers are right; what is of no class gets one too`
      : `Its score is ${percent(score)}, which says little of how often such answers are right`;
    parts.push(element("p", label === null ? "Too unsure to name one; the likeliest:" : right, "note"));
  }
  const rows = element("ul", "", "rows");
  for (const row of topk) {
    const item = document.createElement("li"), fill = element("div", "", "fill");
    fill.style.width = percent(row.score).replace("\u00a0", "");
    item.append(fill, element("span", row.label), element("span", percent(row.score)));
    rows.append(item);
  }
  parts.push(rows);
  const often = Object.entries(known?.mistaken?.[label] ?? {}).sort((one, other) => other[1] - one[1]);
  if (often.length) {
    const others = often.slice(0, 3).map(([name, share]) => `${name} (${percent(share)})`).join(", ");
    parts.push(element("p", `“${label}” is sometimes said of what is really: ${others}`, "note mistaken"));
  }
  if (known?.explains) {
    const look = element("button", "Where did it look?");
    look.setAttribute("aria-label", `Where did it look in ${card.name}?`);
    look.onclick = () => explain(card, look);
    parts.push(look);
  }
  return parts;
}

async function explain(card, look) {
  look.disabled = true;
  try {
    const answer = await ask("v1/explain", { method: "POST", body: card.file, headers: { "Content-Type": "application/octet-stream" } });
    if (answer.headers.get("X-Model-SHA256") !== card.by) throw new Told("The service has loaded another classifier since; give the image again");
    const map = element("img", "", "map"), branches = answer.headers.get("X-Branches");
    map.src = URL.createObjectURL(await answer.blob());
    map.alt = `Where it looked, from left to right: ${branches}`;
    look.replaceWith(map, element("p", map.alt, "note"));
  } catch (error) {
    look.replaceWith(element("p", error.message, "error"));
  }
  if (document.activeElement === document.body) card.item.focus();
}

function progress() {
  const done = cards.filter((card) => card.found), failed = done.filter((card) => card.found.error);
  $("bar").hidden = !cards.length;
  $("csv").disabled = !done.length;
  const bad = failed.length ? `, of which ${failed.length} could not be judged` : "";
  $("progress").textContent = cards.length ? `${done.length} of ${cards.length} images done${bad}` : "";
}

function csv() {
  const quoted = (cell) => (/[",\r\n]/.test(cell) ? `"${String(cell).replaceAll('"', '""')}"` : String(cell));
  const answers = cards.map((card) => card.found).filter((found) => found && !found.error); // of several classifiers, maybe
  const several = model?.multi_label || answers.some((found) => found.labels);
  const most = Math.max(Math.min(TOPK, model?.classes.length ?? TOPK), ...answers.map((found) => found.topk.length));
  const ranked = Array.from({ length: most }, (_, i) => [`label_${i + 1}`, `score_${i + 1}`]).flat();
  const heading = several ? ["path", "labels", "scores", ...ranked, "error"] : ["path", "label", "score", ...ranked.slice(2), "error"];
  const lines = [heading];
  for (const { name, found } of cards.filter((card) => card.found)) {
    let cells = [];
    if (!found.error) {
      cells = found.topk.flatMap((row) => [row.label, row.score.toFixed(6)]);
      const named = found.labels ?? (found.label === null ? [] : [found]);
      if (several) cells.unshift(named.map((row) => row.label).join("|"), named.map((row) => row.score.toFixed(6)).join("|"));
      else if (found.label === null) cells[0] = "";
    }
    const empty = Array(heading.length - 2 - cells.length).fill("");
    lines.push([name, ...cells, ...empty, found.error ?? ""]);
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.map((line) => line.map(quoted).join(",")).join("\n") + "\n"], { type: "text/csv" }));
  link.download = "answers.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function clear() {
  for (const card of cards.splice(0)) URL.revokeObjectURL(card.url);
  waiting.length = 0;
  $("cards").replaceChildren();
  progress();
  $("files").focus();
}

for (const id of ["files", "camera"]) {
  $(id).addEventListener("change", ({ target }) => { add(target.files); target.value = ""; });
}
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length) { event.preventDefault(); add(files); }
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); document.body.classList.add("over"); });
}
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  add(event.dataTransfer.files);
});
$("csv").addEventListener("click", csv);
$("clear").addEventListener("click", clear);
$("token-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  await connect();
  if (model) for (const card of cards.filter((one) => one.found?.error)) send(card);
});
connect();
