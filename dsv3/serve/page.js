// The chat page. Text of the model or the server reaches the page through textContent alone; the server's
// Content-Security-Policy (page.py) would block anything else.

const SESSION = "dsv3-chat";
const SETTINGS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const WIDE = matchMedia("(min-width: 52.01rem)");

const part = (id) => document.getElementById(id);

function element(name, { className, text, children = [], ...attributes } = {}) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
}

const button = (text, onClick) => {
  const made = element("button", { type: "button", text });
  made.addEventListener("click", () => onClick(made));
  return made;
};

// ---- What is remembered ----

let turns = []; // {role: "user", text} and {role: "assistant", text, reasoning, ...}, by turns.
let views = []; // What shows them, one for one.
let running = null; // The AbortController of the answer that is being made.
let apiKey = ""; // Kept here and nowhere else.

function save() {
  const settings = Object.fromEntries(["system", "thinking", ...SETTINGS].map((id) => [id, part(id).value]));
  try {
    sessionStorage.setItem(SESSION, JSON.stringify({ turns, settings }));
  } catch {
    say("This browser does not keep the conversation: it will be gone when the page is.");
  }
}

function restore() {
  let kept = null;
  try {
    kept = JSON.parse(sessionStorage.getItem(SESSION));
  } catch {
    // Storage that is switched off or holds something else is the same as none.
  }
  for (const [id, value] of Object.entries(kept?.settings ?? {})) part(id).value = value;
  // An answer that was being made when the page went away will not go on.
  for (const turn of kept?.turns ?? []) addTurn(turn.role === "user" ? turn : { ...turn, isFinished: true });
}

// ---- Speaking with the server ----

function headers() {
  return apiKey ? { Authorization: `Bearer ${apiKey}` } : {};
}

/** The messages so far. Questions without an answer are left out, but the last: models expect turns to alternate. */
function messages() {
  const sent = part("system").value.trim() ? [{ role: "system", content: part("system").value }] : [];
  turns.forEach((turn, place) => {
    if (turn.role !== "user") return;
    const answer = turns[place + 1];
    const isLast = !answer || place + 2 === turns.length && !answer.isFinished;
    if (!isLast && !answer.text) return;
    sent.push({ role: "user", content: turn.text });
    if (!isLast) sent.push({ role: "assistant", content: answer.text });
  });
  return sent;
}

function requestBody() {
  // Continuous usage counts tokens as they come; a server without it sends the count at the end, and we guess until then.
  const body = { messages: messages(), stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  if (part("model").value) body.model = part("model").value;
  for (const id of SETTINGS) if (part(id).value !== "") body[id] = Number(part(id).value);
  if (part("thinking").value) body.thinking = { type: part("thinking").value };
  return body;
}

/** The data of each server-sent event. Comments, which keep the connection alive, are skipped. */
async function* eventData(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "", data = [];
  try {
    while (true) {
      const { value, done } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n|\r(?!$)/); // A \r at the very end may be the first half of \r\n.
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line !== "" || !data.length) continue;
        yield data.join("\n");
        data = [];
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // Broken or at its end already, for all we care.
  }
}

class ServerError extends Error {}

async function refusal(response) {
  const text = await response.text();
  let said = text;
  try {
    const body = JSON.parse(text);
    said = body.error?.message ?? body.message ?? body.detail ?? text;
    if (typeof said !== "string") said = JSON.stringify(said);
  } catch {
    // Not JSON: a proxy's own page, of which the beginning says enough.
  }
  said = said.trim().slice(0, 600) || "(nothing)";
  const seconds = response.headers.get("Retry-After");
  if (response.status === 429 && seconds) said = `${said.replace(/\.?$/, ".")} Try again in ${seconds} s.`;
  return new ServerError(`The server answered ${response.status}: ${said}`);
}

/** Yields the chunks of one answer; returns false where the server asks for a key instead. */
async function* chunks(body, signal) {
  let response;
  try {
    response = await fetch("v1/chat/completions", {
      method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json", ...headers() }, signal,
    });
  } catch (error) {
    throw signal.aborted ? error : new ServerError("The server cannot be reached. Is it still running?");
  }
  if (response.status === 401) return false;
  if (!response.ok) throw await refusal(response);
  let isWhole = false;
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return true;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(`The server gave up: ${chunk.error.message ?? JSON.stringify(chunk.error)}`);
      isWhole ||= Boolean(chunk.choices?.[0]?.finish_reason);
      yield chunk;
    }
  } catch (error) {
    if (signal.aborted || error instanceof ServerError) throw error;
    if (error instanceof SyntaxError) throw new ServerError("The server sent something that is not JSON.");
    throw new ServerError("The connection broke before the answer was whole.");
  }
  if (!isWhole) throw new ServerError("The connection ended before the answer did.");
  return true;
}

async function loadModels() {
  const key = apiKey;
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) {
      // An answer that is under way will ask by itself; a key that was refused since then is no longer the question.
      if (key === apiKey && !running) askForKey();
      return;
    }
    if (!response.ok) throw await refusal(response);
    const names = (await response.json()).data.map((model) => model.id);
    part("model").replaceChildren(...names.map((name) => element("option", { value: name, text: name })));
    part("model").disabled = names.length < 2;
    say("");
  } catch (error) {
    say(error instanceof ServerError ? error.message : "The server cannot be reached. Is it still running?");
  }
}

// ---- What is measured of an answer ----

const SHORTEST_TIMED = 0.05;

class Measured {
  #start = performance.now();
  #first = null;
  #last = null;
  #tokensAtFirst = 1;
  #pieces = 0;
  #usage = null;

  read(chunk) {
    const delta = chunk.choices?.[0]?.delta ?? {};
    if (chunk.usage) this.#usage = chunk.usage;
    if (!delta.content && !reasoningOf(delta)) return;
    this.#pieces += 1;
    this.#last = performance.now();
    if (this.#first !== null) return;
    this.#first = this.#last;
    this.#tokensAtFirst = chunk.usage?.completion_tokens ?? 1;
  }

  get secondsSoFar() {
    return (performance.now() - this.#start) / 1000;
  }

  /** Name and text of each number that is known. Acceptance is of the tokens that the MTP modules drafted. */
  figures() {
    const usage = this.#usage ?? {};
    const tokens = usage.completion_tokens ?? this.#pieces;
    const about = this.#usage ? "" : "≈ ";
    const decodeSeconds = (this.#last - this.#first) / 1000;
    const figures = {};
    // Of an answer that arrives all at once, the time between its pieces is the network's, not the model's.
    if (decodeSeconds >= SHORTEST_TIMED && tokens > this.#tokensAtFirst) {
      figures.speed = `${about}${short((tokens - this.#tokensAtFirst) / decodeSeconds)} tokens/s`;
    }
    if (this.#first !== null) figures.first = `first after ${short((this.#first - this.#start) / 1000)} s`;
    if (tokens) figures.tokens = `${about}${tokens} token${tokens === 1 ? "" : "s"}`;
    const { accepted_prediction_tokens: accepted = 0, rejected_prediction_tokens: rejected = 0 } =
      usage.completion_tokens_details ?? {};
    if (accepted + rejected > 0) figures.drafts = `${Math.round(100 * accepted / (accepted + rejected))} % of drafts accepted`;
    const cached = usage.prompt_tokens_details?.cached_tokens ?? usage.prompt_cache_hit_tokens;
    if (usage.prompt_tokens) figures.prompt = `prompt ${usage.prompt_tokens}${cached ? `, ${cached} from cache` : ""}`;
    return figures;
  }
}

const short = (value) => value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);

const reasoningOf = (delta) => delta.reasoning_content ?? delta.reasoning;

// ---- A turn on the page ----

class QuestionView {
  constructor(turn) {
    this.turn = turn;
    this.text = element("div", { className: "text", text: turn.text });
    this.actions = element("div", { className: "actions", children: [button("Edit", () => this.edit())] });
    this.root = element("article", { className: "question", "aria-label": "You", children: [this.text, this.actions] });
  }

  edit() {
    const field = element("textarea", { "aria-label": "Edit your message", rows: "1" });
    field.value = this.turn.text;
    const close = () => {
      form.replaceWith(this.text);
      this.actions.hidden = false;
      part("message").focus();
    };
    const form = element("form", { className: "card", children: [field, element("div", { className: "row", children: [
      button("Cancel", close), element("button", { type: "submit", className: "strong", text: "Send" }),
    ] })] });
    form.querySelector("button").className = "quiet";
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!running && field.value.trim() && settingsAreValid()) ask(field.value, turns.indexOf(this.turn));
    });
    form.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      close();
    });
    this.text.replaceWith(form);
    this.actions.hidden = true;
    sendsOnEnter(field, form);
    grow(field);
    field.focus();
  }
}

class AnswerView {
  constructor(turn) {
    this.turn = turn;
    this.summary = element("summary");
    this.reasoning = element("div", { className: "reasoning" });
    this.thoughts = element("details", { children: [this.summary, this.reasoning] });
    this.prose = element("div", { className: "prose" });
    this.error = element("p", { className: "error", role: "alert" });
    this.figures = element("p", { className: "figures" });
    this.actions = element("div", { className: "actions", children: [
      button("Copy", (pressed) => copy(this.turn.text, pressed)), button("Regenerate", () => regenerate()),
    ] });
    this.root = element("article", { className: "answer", "aria-label": "Answer", children: [
      this.thoughts, this.prose, this.error, this.figures, this.actions,
    ] });
    this.blocks = [];
    this.update();
  }

  update() {
    const { text, reasoning, thinkingSeconds, isFinished, error, figures } = this.turn;
    this.thoughts.hidden = !reasoning;
    this.summary.textContent = thinkingSeconds === undefined ? "Thinking" : `Thought for ${short(thinkingSeconds)} s`;
    if (this.reasoning.textContent !== reasoning) this.reasoning.textContent = reasoning;
    this.blocks = renderBlocks(this.prose, { text, before: this.blocks });
    this.prose.classList.toggle("waiting", !isFinished && !text);
    this.error.hidden = !error;
    this.error.textContent = error ?? "";
    this.figures.replaceChildren(...Object.entries(figures).map(([name, shown]) =>
      element("span", { "data-figure": name, text: shown })));
    this.actions.hidden = !isFinished;
    this.actions.firstChild.hidden = !text;
    this.actions.lastChild.textContent = error ? "Try again" : "Regenerate";
  }
}

function addTurn(turn) {
  const view = turn.role === "user" ? new QuestionView(turn) : new AnswerView(turn);
  turns.push(turn);
  views.push(view);
  part("turns").append(view.root);
  part("welcome").hidden = true;
  return view;
}

function dropTurns(from) {
  turns = turns.slice(0, from);
  for (const view of views.splice(from)) view.root.remove();
  part("welcome").hidden = turns.length > 0;
}

/** Only the last question can be edited, only the last answer made again. */
function offerActions() {
  views.forEach((view, place) => {
    const isLast = place >= views.length - 2 && !running;
    if (view instanceof QuestionView) view.actions.hidden = !isLast;
    else view.actions.lastChild.hidden = !isLast;
  });
}

// ---- Asking and answering ----

function ask(text, place = turns.length) {
  dropTurns(place);
  addTurn({ role: "user", text });
  answer();
}

function regenerate() {
  if (running || !settingsAreValid()) return;
  dropTurns(turns.length - 1);
  answer();
}

async function answer() {
  const turn = { role: "assistant", text: "", reasoning: "", isFinished: false, figures: {} };
  const view = addTurn(turn);
  const measured = new Measured();
  running = new AbortController();
  setBusy(true);
  scrollDown();
  const show = oncePerFrame(() => followingTheEnd(() => view.update()));
  let hasKey = true;
  try {
    hasKey = await readAnswer(turn, { measured, show, signal: running.signal });
  } catch (error) {
    if (running.signal.aborted) turn.figures.ended = "stopped";
    else turn.error = error instanceof ServerError ? error.message : `The page failed: ${error.message}`;
  }
  running = null;
  turn.isFinished = true;
  if (hasKey) followingTheEnd(() => view.update());
  else if (turns.includes(turn)) dropTurns(turns.indexOf(turn));
  setBusy(false);
  save();
  if (!hasKey) askForKey();
}

async function readAnswer(turn, { measured, show, signal }) {
  const stream = chunks(requestBody(), signal);
  while (true) {
    const { value: chunk, done } = await stream.next();
    if (done) return chunk; // Of the generator: whether there was an answer at all.
    measured.read(chunk);
    const choice = chunk.choices?.[0];
    const delta = choice?.delta ?? {};
    turn.reasoning += reasoningOf(delta) ?? "";
    turn.text += delta.content ?? "";
    if (turn.reasoning && turn.text) turn.thinkingSeconds ??= measured.secondsSoFar;
    turn.figures = measured.figures();
    if (choice?.finish_reason === "length") turn.isCut = true;
    if (turn.isCut) turn.figures.ended = "cut off: no tokens left";
    show();
  }
}

function setBusy(isBusy) {
  const hadFocus = document.activeElement === part("stop") || document.activeElement === document.body;
  part("send").hidden = isBusy;
  part("stop").hidden = !isBusy;
  part("turns").setAttribute("aria-busy", String(isBusy)); // Read aloud when it is whole, not word by word.
  say(isBusy ? "Answering …" : "");
  if (!isBusy && hadFocus) part("message").focus();
  offerActions();
}

function stop() {
  running?.abort();
}

function newChat() {
  stop();
  dropTurns(0);
  save();
  part("message").focus();
}

function askForKey() {
  part("key-form").hidden = false;
  say(apiKey ? "The server does not accept this key." : "");
  scrollDown();
  part("key").focus();
}

function useKey() {
  apiKey = part("key").value;
  part("key").value = "";
  part("key-form").hidden = true;
  part("message").focus();
  loadModels();
  if (turns.at(-1)?.role === "user") answer();
}

// ---- Text to elements: a small Markdown ----

const MAX_DEPTH = 8; // Of lists and quotes within one another, and of emphasis.
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +|$)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;

/** Shows text in `root`, and keeps the elements of blocks that have not changed: selections and focus survive. */
function renderBlocks(root, { text, before }) {
  const blocks = splitBlocks(text.split("\n"));
  const made = blocks.map((block, place) => {
    const source = block.kind + block.lines.join("\n");
    if (before[place]?.source === source) return before[place];
    return { source, root: blockElement(block, 0) };
  });
  made.forEach((block, place) => {
    if (before[place] === block) return;
    if (before[place]) before[place].root.replaceWith(block.root);
    else root.append(block.root);
  });
  for (const { root: old } of before.slice(made.length)) old.remove();
  return made;
}

/** Cuts lines into blocks {kind, lines}. A fence that is still open runs to the end, as it does while an answer comes. */
function splitBlocks(lines) {
  const blocks = [];
  let place = 0;
  const take = (kind, goesOn) => {
    const start = place;
    do place += 1; while (place < lines.length && goesOn(lines[place], lines[place - 1]));
    blocks.push({ kind, lines: lines.slice(start, place) });
  };
  while (place < lines.length) {
    const line = lines[place];
    const fence = FENCE.exec(line);
    if (!line.trim()) place += 1;
    else if (fence) {
      const isClosing = (text) => text.trim().length >= fence[1].length && !text.trim().replaceAll(fence[1][0], "");
      const start = place;
      take("code", (_, previous) => place === start + 1 || !isClosing(previous));
    } else if (HEADING.test(line)) take("heading", () => false);
    else if (RULE.test(line)) take("rule", () => false);
    else if (QUOTE.test(line)) take("quote", (next) => QUOTE.test(next));
    else if (ITEM.test(line)) take("list", (next, previous) => belongsToList(next, { previous, first: line }));
    else take("paragraph", (next) => next.trim() && !FENCE.test(next) && !HEADING.test(next) && !QUOTE.test(next) && !ITEM.test(next));
  }
  return blocks;
}

const isOrdered = (line) => /^ *\d/.test(line);

/** Whether an item is of a list within the list: two spaces further in are enough, whatever its marks. */
const isWithin = (item, first) => item[1].length >= ITEM.exec(first)[1].length + 2;

function belongsToList(next, { previous, first }) {
  if (!next.trim()) return true;
  const item = ITEM.exec(next);
  if (item) return isWithin(item, first) || !RULE.test(next) && isOrdered(next) === isOrdered(first);
  return /^ {2,}/.test(next) || Boolean(previous.trim()) && !FENCE.test(next) && !HEADING.test(next) && !QUOTE.test(next);
}

function blockElement({ kind, lines }, depth) {
  if (kind === "code") return codeElement(lines);
  if (kind === "rule") return element("hr");
  if (kind === "heading") {
    const [, marks, text] = HEADING.exec(lines[0]);
    return element(`h${Math.min(marks.length + 1, 4)}`, { children: inline(text) });
  }
  if (depth < MAX_DEPTH && kind === "list") return listElement(lines, depth);
  if (depth < MAX_DEPTH && kind === "quote") {
    const inner = splitBlocks(lines.map((line) => line.replace(QUOTE, "")));
    return element("blockquote", { children: inner.map((block) => blockElement(block, depth + 1)) });
  }
  const children = lines.flatMap((line, place) => {
    const isBroken = place + 1 < lines.length && / {2,}$|\\$/.test(line);
    const shown = inline((isBroken ? line.replace(/ +$|\\$/, "") : line) + (place + 1 < lines.length ? "\n" : ""));
    return isBroken ? [...shown, element("br")] : shown;
  });
  return element("p", { children });
}

function codeElement(lines) {
  const [, marks, language] = FENCE.exec(lines[0]);
  const last = lines.length > 1 ? lines.at(-1).trim() : "";
  const isClosed = last.length >= marks.length && !last.replaceAll(marks[0], "");
  const text = lines.slice(1, isClosed ? -1 : undefined).join("\n");
  const head = element("div", { children: [element("span", { text: language || "text" }), button("Copy", (pressed) => copy(text, pressed))] });
  head.lastChild.setAttribute("aria-label", "Copy code");
  const body = element("pre", { tabindex: "0", "aria-label": "Code", children: [element("code", { text })] });
  return element("div", { className: "code", children: [head, body] });
}

function listElement(lines, depth) {
  const items = [];
  let indent = 0; // Where the text of the item begins, which its further lines are moved back by.
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && !isWithin(item, lines[0])) {
      indent = item[1].length + item[2].length + Math.min(item[3].length || 1, 4);
      items.push([line.slice(item[0].length)]);
    } else {
      items.at(-1).push(line.slice(Math.min(indent, line.length - line.trimStart().length)));
    }
  }
  const made = items.map((item) => {
    const blocks = splitBlocks(item).map((block) => [block.kind, blockElement(block, depth + 1)]);
    // A list item of one line needs no paragraph around it.
    return element("li", { children: blocks.flatMap(([kind, root]) => kind === "paragraph" && blocks[0][1] === root ? [...root.childNodes] : [root]) });
  });
  if (!isOrdered(lines[0])) return element("ul", { children: made });
  return element("ol", { start: String(parseInt(lines[0], 10)), children: made });
}

const MARK = /\\[!-/:-@[-`{-~]|`+|\*{1,3}|_{1,2}|!?\[|https?:\/\/[^\s<>"')\]]+/g;

/** The nodes of one run of text. Marks without a partner stay as they were written. */
function inline(text, depth = 0) {
  if (depth > MAX_DEPTH) return [text];
  const nodes = [];
  const marks = new RegExp(MARK);
  let shown = 0;
  for (let mark = marks.exec(text); mark; mark = marks.exec(text)) {
    const found = marked(text, { mark: mark[0], start: mark.index, depth });
    if (!found) continue;
    nodes.push(text.slice(shown, mark.index), found.node);
    shown = marks.lastIndex = found.end;
  }
  nodes.push(text.slice(shown));
  return nodes.filter((node) => node !== "");
}

/** What a mark at `start` begins, {node, end}, or null. */
function marked(text, { mark, start, depth }) {
  const inside = start + mark.length;
  if (mark[0] === "\\") return { node: mark[1], end: inside };
  if (mark[0] === "`") return codeSpan(text, { mark, start });
  if (mark.startsWith("http")) {
    const address = mark.replace(/[.,;:!?*_]+$/, "");
    return { node: link(address, [address]), end: start + address.length };
  }
  if (mark.endsWith("[")) {
    const whole = /^!?\[((?:[^\[\]\\]|\\.)*)\]\(\s*<?([^\s()<>]*(?:\([^\s()]*\)[^\s()<>]*)?)>?(?:\s+"[^"]*")?\s*\)/.exec(text.slice(start, start + 4000));
    return whole && { node: link(whole[2], inline(whole[1], depth + 1)), end: start + whole[0].length };
  }
  const isWordBefore = mark[0] === "_" && /\w/.test(text[start - 1] ?? "");
  if (isWordBefore || !text[inside]?.trim()) return null;
  const end = closing(text, { mark, from: inside });
  if (end < 0) return null;
  const children = inline(text.slice(inside, end), depth + 1);
  const strong = mark.length > 1 ? [element("strong", { children })] : children;
  return { node: mark.length === 2 ? strong[0] : element("em", { children: strong }), end: end + mark.length };
}

function codeSpan(text, { mark, start }) {
  const runs = /`+/g;
  runs.lastIndex = start + mark.length;
  for (let run = runs.exec(text); run; run = runs.exec(text)) {
    if (run[0] !== mark) continue;
    const code = text.slice(start + mark.length, run.index).replace(/^ (.*[^ ].*) $/s, "$1");
    return { node: element("code", { text: code }), end: runs.lastIndex };
  }
  return null;
}

/** Where the partner of an emphasis mark stands: after a letter, and for _ before no other; else -1. */
function closing(text, { mark, from }) {
  for (let end = text.indexOf(mark, from + 1); end >= 0; end = text.indexOf(mark, end + 1)) {
    const isDouble = mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark);
    const isInWord = mark[0] === "_" && /\w/.test(text[end + mark.length] ?? "");
    if (text[end - 1].trim() && !isDouble && !isInWord) return end;
  }
  return -1;
}

/** A link to the web or to a mail address; of anything else only the words are left. Pictures are never fetched. */
function link(address, children) {
  let protocol = "";
  try {
    protocol = new URL(address).protocol;
  } catch {
    // Not a whole address.
  }
  if (!["http:", "https:", "mailto:"].includes(protocol)) return element("span", { children });
  return element("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer nofollow", children });
}

// ---- Small things of the page ----

function say(text) {
  part("status").textContent = text;
}

async function copy(text, pressed) {
  const label = pressed.textContent;
  pressed.textContent = await copied(text) ? "Copied" : "Not allowed";
  say(pressed.textContent);
  setTimeout(() => {
    pressed.textContent = label;
    if (!running) say("");
  }, 1500);
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // The clipboard is for secure pages; a server in the local network is reached over plain HTTP.
  }
  const before = document.activeElement;
  const field = element("textarea", { "aria-hidden": "true" });
  field.value = text;
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  before?.focus();
  return isCopied;
}

function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`; // With its borders.
}

function sendsOnEnter(field, form) {
  field.addEventListener("input", () => grow(field));
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // Composing: Enter chooses a character.
    event.preventDefault();
    form.requestSubmit();
  });
}

function oncePerFrame(action) {
  let isWaiting = false;
  return () => {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      action();
    });
  };
}

/** Does something that makes the page longer, and stays at the end if the reader was there. */
function followingTheEnd(action) {
  const { scrollHeight, scrollTop, clientHeight } = part("reading");
  action();
  if (scrollHeight - scrollTop - clientHeight < 60) scrollDown();
}

function scrollDown() {
  part("reading").scrollTop = part("reading").scrollHeight;
}

function showSettings(isShown) {
  part("settings").hidden = !isShown;
  part("open-settings").setAttribute("aria-expanded", String(isShown));
}

/** Opens the panel where a number is out of its range, so that the browser can say so beside it. */
function settingsAreValid() {
  if (part("settings-form").checkValidity()) return true;
  showSettings(true);
  return part("settings-form").reportValidity();
}

function onSubmit(id, action) {
  part(id).addEventListener("submit", (event) => {
    event.preventDefault();
    action();
  });
}

onSubmit("composer", () => {
  const text = part("message").value;
  if (running || !text.trim() || !settingsAreValid()) return;
  part("message").value = "";
  grow(part("message"));
  ask(text);
});
onSubmit("key-form", useKey);
onSubmit("settings-form", () => showSettings(WIDE.matches));
sendsOnEnter(part("message"), part("composer"));
part("stop").addEventListener("click", stop);
part("new-chat").addEventListener("click", newChat);
part("settings-form").addEventListener("change", save);
part("open-settings").addEventListener("click", () => {
  showSettings(part("settings").hidden);
  if (!part("settings").hidden) part("system").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (running) stop();
  else if (!part("settings").hidden && !WIDE.matches) {
    showSettings(false);
    part("open-settings").focus();
  }
});
WIDE.addEventListener("change", () => {
  if (!WIDE.matches) showSettings(false); // It would cover the chat.
});
addEventListener("pagehide", save);

restore();
offerActions();
showSettings(matchMedia("(min-width: 72rem)").matches);
scrollDown();
part("message").focus();
loadModels();
