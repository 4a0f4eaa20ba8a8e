// Ask the server for images, and show how they appear. Every address is relative: the page may stand anywhere.

const PREVIEWS = 16; // looks at one image on its way
const FEW_PREVIEWS = 2; // for those whom flickering pictures trouble
const TRIES = 5; // to find a lost connection again: 1, 2, 4 … seconds apart
const SILENCE = 40; // seconds without a word on a stream, on which the server says every 15 that it is there
const SMALL = 96; // pixels, under which an image is shown with its pixels as squares

const $ = (id) => document.getElementById(id);
const sleep = (seconds) => new Promise((wake) => setTimeout(wake, 1000 * seconds));

let model = null; // what /v1/model said
let run = null; // the request that is shown, under way or over: { id, request, stop, over, tries }

// --- the server ---------------------------------------------------------------------------------------------

/** What went wrong, in words for people. param: the field at fault. lost: nobody answered. */
class Problem extends Error {
  constructor(message, { status = 0, param = null, lost = false } = {}) {
    super(message);
    Object.assign(this, { status, param, lost });
  }
}

/** Ask the server. Throws a Problem where it refuses or does not answer. */
async function ask(path, { headers = {}, ...options } = {}) {
  const key = $("key").value.trim();
  const shown = key ? { Authorization: `Bearer ${key}`, ...headers } : headers;
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", ...options, headers: shown });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Problem("The server does not answer. Does it still run, and are you connected?", { lost: true });
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

/** The Problem in an answer that is an error: the server's own sentence, and when to come again. */
async function refusal(answer) {
  let told = { message: `The server answered ${answer.status}` };
  try {
    told = (await answer.json()).error ?? told;
  } catch {
    // Not our server's words: of something between it and us.
  }
  const seconds = Number(answer.headers.get("Retry-After"));
  const said = /again in/.test(told.message); // by the sentence itself
  const later = seconds > 0 && !said ? ` Try again in ${seconds} s.` : "";
  return new Problem(sentence(told.message) + later, { status: answer.status, param: told.param });
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

function broken() {
  return new Problem("The connection to the server broke.", { lost: true });
}

/** The next part of a stream; as its end, where it breaks or is silent for too long. */
async function heard(reader) {
  let timer;
  const silence = new Promise((end) => {
    timer = setTimeout(() => end({ done: true }), 1000 * SILENCE);
  });
  const part = reader.read().catch(() => ({ done: true }));
  return Promise.race([part, silence]).finally(() => clearTimeout(timer));
}

/** The server-sent events of an answer, { name, data }, until it breaks. (EventSource cannot show an API key.) */
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await heard(reader);
      if (done) throw broken();
      const parts = (text + value).split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const found = /^event: (.*)\ndata: (.*)$/.exec(part);
        if (found) yield { name: found[1], data: JSON.parse(found[2]) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// --- what may be chosen -------------------------------------------------------------------------------------

/** Fill the form with what the model can do; where the server wants a key first, ask for that. */
async function open() {
  model = await (await ask("v1/model")).json();
  const [channels, ...size] = model.image_shape;
  const shape = `${size.join(" × ")} pixels${channels === 1 ? "" : `, ${channels} channels`}`;
  document.title = `Images out of noise: ${model.name}`;
  $("about").textContent = `The model ${model.name} makes images of ${shape}.`;
  $("count").max = model.limits.count;
  $("count").value = Math.min($("count").value, model.limits.count);
  $("steps").max = model.limits.steps;
  $("solver").replaceChildren(...model.solvers.map((name) => new Option(name, name, false, name === "fast")));
  const names = Array.from({ length: model.classes }, (_, i) => model.class_names[i] ?? String(i));
  $("labels").replaceChildren($("labels").options[0], ...names.map((name, i) => new Option(name, i)));
  $("labels-field").hidden = !model.classes;
  $("guidance-field").hidden = !model.guidance;
  $("guidance").min = -model.limits.guidance;
  $("guidance").max = model.limits.guidance;
}

/** Say how far a server is that has just started, until it takes requests. */
async function awaitReady() {
  for (;;) {
    try {
      await ask("ready");
      if (!run) say("None yet.");
      return;
    } catch (problem) {
      if (problem.status !== 503 || run) return;
      say(problem.message);
    }
    await sleep(1);
  }
}

/** The body of a request, of the fields that are filled in. */
function chosen() {
  const body = { count: $("count").valueAsNumber, solver: $("solver").value };
  if ($("steps").value) body.steps = $("steps").valueAsNumber;
  if ($("seed").value) body.seed = $("seed").value; // as text: JavaScript rounds what is over 2^53
  if ($("labels").value) body.labels = Number($("labels").value);
  if ($("guidance").value) body.guidance = $("guidance").valueAsNumber;
  return body;
}

// --- one request --------------------------------------------------------------------------------------------

/** Ask for images, watch them, and show them. */
async function make() {
  forget(run);
  const mine = { id: null, request: null, stop: new AbortController(), over: false, tries: 0 };
  run = mine;
  begin();
  try {
    if (!model) await open();
    const body = chosen();
    const headers = { "Content-Type": "application/json", Prefer: "respond-async" };
    const accepted = await ask("v1/samples", { method: "POST", headers, body: JSON.stringify(body) });
    ({ id: mine.id, request: mine.request } = await accepted.json());
    showTiles(mine.request.count);
    await patiently(mine, follow);
    await patiently(mine, finish);
  } catch (error) {
    say(mine.stop.signal.aborted ? "Cancelled." : "Not done.");
    if (!mine.stop.signal.aborted) tell(error);
    forget(mine);
  } finally {
    end(mine);
  }
}

/** Do something that needs the server, and again where the connection is lost. Throws a Problem where it stays so. */
async function patiently(mine, action) {
  for (mine.tries = 0; ; ) {
    try {
      return await action(mine);
    } catch (error) {
      mine.stop.signal.throwIfAborted();
      if (!error.lost || mine.tries === TRIES) throw error;
      say("The connection to the server is lost. Looking for it again …");
      await sleep(2 ** mine.tries++);
    }
  }
}

/** Watch a request until it is done. */
async function follow(mine) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const looks = Math.min(still ? FEW_PREVIEWS : PREVIEWS, model.limits.previews);
  const answer = await ask(`v1/samples/${mine.id}/events?previews=${looks}`, { signal: mine.stop.signal });
  for await (const { name, data } of eventsOf(answer)) {
    mine.tries = 0;
    if (name === "done") return;
    if (name === "failed") throw new Problem(sentence(data.error.message));
    if (name === "cancelled") throw new Problem("The server called this off.");
    showProgress(data);
  }
}

/** Show the finished images, and offer them. */
async function finish(mine) {
  const signal = mine.stop.signal;
  if (model.shows_pictures) {
    const done = await (await ask(`v1/samples/${mine.id}?format=json`, { signal })).json();
    done.images.forEach((image, i) => showImage(i, image, mine.request.seed));
  }
  $("all-png").hidden = !model.shows_pictures;
  $("downloads").hidden = false;
  const { count, seed, steps } = mine.request;
  say(`Done: ${count} image${count === 1 ? "" : "s"} in ${steps} steps, of seed ${seed}.`);
}

/** Call a request off; what is on its way to be asked for is called off when it has an id. */
function cancel() {
  run?.stop.abort();
}

/** Let the server free what it holds for a request. Nothing is to be said where it no longer does. */
function forget(mine) {
  if (!mine?.id) return;
  ask(`v1/samples/${mine.id}`, { method: "DELETE", keepalive: true }).catch(() => {});
  mine.id = null;
}

/** Save all images of the request that is shown, in one file. */
async function saveAll(format) {
  tell(null);
  try {
    const answer = await ask(`v1/samples/${run.id}?format=${format}`);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = `${model.name}-seed-${run.request.seed}.${format}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch (error) {
    tell(error);
  }
}

// --- what is seen -------------------------------------------------------------------------------------------

function begin() {
  tell(null);
  say("Asking …");
  $("images").replaceChildren();
  $("downloads").hidden = true;
  $("progress").value = 0;
  $("progress").hidden = false;
  $("cancel").hidden = false;
  $("make").setAttribute("aria-disabled", "true"); // it keeps the focus, which a disabled button would lose
}

function end(mine) {
  mine.over = true;
  $("progress").hidden = true;
  $("make").removeAttribute("aria-disabled");
  if (document.activeElement === $("cancel")) $("make").focus();
  $("cancel").hidden = true;
}

/** Say how it is going. It is read out, so it changes seldom. */
function say(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

/** Show what went wrong, at its field where it has one; null: nothing. */
function tell(error) {
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-errormessage");
  }
  $("error").textContent = error?.message ?? "";
  if (!error) return;
  if (!(error instanceof Problem)) console.error(error);
  const wrong = error.status === 401 ? $("key") : $("form").elements.namedItem(error.param ?? "");
  if (error.status === 401) {
    $("key-field").hidden = false;
    $("document").hidden = true; // a link cannot show a key
  }
  wrong?.setAttribute("aria-invalid", "true");
  wrong?.setAttribute("aria-errormessage", "error");
  wrong?.focus();
}

function showProgress({ index, png, progress, status }) {
  $("progress").value = progress;
  say(status === "queued" ? "Waiting for room on the server …" : `At work: ${25 * Math.floor(4 * progress)} % done.`);
  if (png) pictureIn(tiles()[index], png, `Image ${index + 1}, on its way`);
}

function tiles() {
  return document.querySelectorAll("#images li");
}

/** A place for each image, of its shape. */
function showTiles(count) {
  if (!model.shows_pictures) return;
  const [height, width] = model.image_shape.slice(1);
  const made = Array.from({ length: count }, () => {
    const [item, figure, tile] = ["li", "figure", "div"].map((name) => document.createElement(name));
    tile.className = Math.max(height, width) < SMALL ? "tile small" : "tile";
    tile.style.aspectRatio = `${width} / ${height}`;
    figure.append(tile);
    item.append(figure);
    return item;
  });
  $("images").replaceChildren(...made);
  const heading = $("images-heading");
  if (heading.getBoundingClientRect().top > innerHeight / 2) heading.scrollIntoView(); // on a phone, below the form
}

/** Put a picture, a PNG in base64, into its place. */
function pictureIn(item, png, alt) {
  const tile = item.querySelector(".tile");
  const image = tile.firstElementChild ?? tile.appendChild(new Image());
  image.src = `data:image/png;base64,${png}`;
  image.alt = alt;
}

function showImage(i, { label, png }, seed) {
  const item = tiles()[i];
  const name = label === null ? "" : (model.class_names[label] ?? String(label));
  pictureIn(item, png, `Image ${i + 1}${name && `: ${name}`}`);
  const caption = document.createElement("figcaption");
  const link = document.createElement("a");
  const which = document.createElement("span");
  which.className = "unseen";
  which.textContent = ` image ${i + 1}`;
  link.append("Save", which);
  link.href = item.querySelector("img").src;
  link.download = `${model.name}-seed-${seed}-${i}.png`;
  caption.append(name, link);
  item.firstElementChild.append(caption);
}

// --- the beginning ------------------------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!run || run.over) make();
});
$("cancel").addEventListener("click", cancel);
$("downloads").addEventListener("click", ({ target }) => {
  if (target.dataset.format) saveAll(target.dataset.format);
});
addEventListener("pagehide", () => {
  cancel();
  forget(run);
});

try {
  await open();
  await awaitReady();
} catch (error) {
  $("about").textContent = "";
  tell(error);
}
