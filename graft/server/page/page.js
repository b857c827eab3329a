"use strict";

// Difference in nats at which a token's colour is strongest: about 50 times more likely.
const FULL_COLOUR = 4;
const CHOSEN_AT_START = 3;

const $ = (id) => document.getElementById(id);
const clone = (id) => $(id).content.firstElementChild.cloneNode(true);
let key = sessionStorage.getItem("graft-key") || "";
let base = "";
let running = null;

// The server

async function call(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (response.ok) return response;
  const content = await response.json().catch(() => ({}));
  const error = new Error(content.error?.message || `the server responded with status ${response.status}`);
  error.status = response.status;
  throw error;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// The form

function makeRow(name, chosen, title) {
  const row = clone("row");
  const [box, slider, number] = row.querySelectorAll("input");
  row.querySelector("span").textContent = name;
  row.title = title;
  box.checked = chosen;
  slider.setAttribute("aria-label", `Scale of ${name}`);
  number.setAttribute("aria-label", `Scale of ${name}, exactly`);
  slider.addEventListener("input", () => { number.value = slider.value; box.checked = true; });
  number.addEventListener("input", () => { slider.value = number.value; box.checked = true; });
  row.dataset.name = name;
  return row;
}

function makePlainRow(name, note, chosen) {
  const row = makeRow(name, chosen, "");
  row.querySelectorAll("input:not([type=checkbox])").forEach((input) => input.remove());
  const small = document.createElement("small");
  small.textContent = note;
  row.append(small);
  return row;
}

async function showModels() {
  const { data } = await (await call("v1/models")).json();
  const adapters = data.filter((model) => model.parent);
  const baseModel = data.find((model) => !model.parent);
  base = baseModel.id;
  if (baseModel.has_chat_template) document.querySelector("[value=chat]").checked = true;
  $("model").textContent = base;
  document.title = `Graft: ${base}`;
  const rows = [makePlainRow("Base", "without adapters", true)];
  adapters.forEach((model, at) => rows.push(makeRow(model.id, at < CHOSEN_AT_START, model.root)));
  if (adapters.length > 1) rows.push(makePlainRow("All together", "the chosen adapters, combined", false));
  $("rows").replaceChildren(...rows);
  if (!adapters.length) {
    const none = document.createElement("p");
    none.className = "none";
    none.textContent = "No adapters are loaded. Start the server with --adapters DIR.";
    $("rows").append(none);
  }
}

// One answer for the base model, for each chosen adapter, and for all of them together.
function wantedAnswers() {
  const chosen = [...$("rows").querySelectorAll(".row")].filter((row) => row.querySelector("input").checked);
  const scaled = chosen.filter((row) => row.querySelector("input[type=number]"));
  const scaleOf = (row) => Number(row.querySelector("input[type=number]").value);
  const answers = chosen.map((row) => {
    const name = row.dataset.name;
    if (name === "Base" && !scaled.includes(row)) return { name, adapters: {} };
    if (scaled.includes(row)) return { name, note: `× ${scaleOf(row)}`, adapters: { [name]: scaleOf(row) } };
    const all = Object.fromEntries(scaled.map((other) => [other.dataset.name, scaleOf(other)]));
    return { name, note: scaled.map((other) => other.dataset.name).join(", "), adapters: all };
  });
  return answers.filter((answer) => answer.name !== "All together" || scaled.length > 1);
}

function sampling() {
  const stop = $("stop").value.replaceAll("\\n", "\n");
  return {
    max_tokens: Number($("max_tokens").value),
    temperature: Number($("temperature").value),
    top_p: Number($("top_p").value),
    ...($("seed").value !== "" && { seed: Number($("seed").value) }),
    ...(stop && { stop }),
  };
}

function summarize() {
  const temperature = Number($("temperature").value);
  const how = temperature ? `temperature ${temperature}, top-p ${$("top_p").value}` : "always the most likely one";
  $("summary").textContent = `up to ${$("max_tokens").value} tokens, ${how}`;
}

// Answers

class Card {
  constructor(answer) {
    this.answer = answer;
    this.element = clone("answer");
    this.text = this.element.querySelector(".text");
    this.readout = this.element.querySelector(".readout");
    this.spans = [];
    this.tokens = [];
    this.pending = [];
    const heading = this.element.querySelector("h2");
    const note = document.createElement("small");
    note.textContent = answer.note ? ` ${answer.note}` : "";
    heading.append(answer.name, note);
    this.text.setAttribute("aria-label", `Answer of ${answer.name}; use the arrow keys to move between tokens`);
    this.text.addEventListener("keydown", (event) => this.step(event));
    this.text.addEventListener("pointerover", (event) => this.point(event));
    this.text.addEventListener("click", (event) => this.point(event));
  }

  get adapted() {
    return Object.values(this.answer.adapters).some((scale) => scale !== 0);
  }

  async run(prompt, chat, settings, signal) {
    try {
      await this.stream(prompt, chat, settings, signal);
      this.element.setAttribute("aria-busy", "false");
      if (this.adapted && this.tokens.length) await this.compare(signal);
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error);
    } finally {
      this.element.setAttribute("aria-busy", "false");
    }
  }

  async stream(prompt, chat, settings, signal) {
    const body = {
      model: base,
      adapters: this.answer.adapters,
      ...settings,
      stream: true,
      return_token_ids: true,
      ...(chat ? { messages: [{ role: "user", content: prompt }], logprobs: true } : { prompt, logprobs: 0 }),
    };
    const response = await call(chat ? "v1/chat/completions" : "v1/completions", body, signal);
    for await (const event of events(response)) {
      const choice = event.choices[0];
      if (choice.prompt_token_ids) this.promptIds = choice.prompt_token_ids;
      const logprobs = choice.logprobs?.content?.map((token) => token.logprob) || choice.logprobs?.token_logprobs || [];
      this.add(choice.text ?? choice.delta.content ?? "", choice.token_ids || [], logprobs);
    }
  }

  // A character can take several tokens: its text comes with the last one, and shows the colour of all.
  add(text, ids, logprobs) {
    const tokens = ids.map((id, at) => ({ id, own: logprobs[at] }));
    this.tokens.push(...tokens);
    this.pending.push(...tokens);
    if (text) {
      const element = document.createElement("b");
      element.textContent = text;
      this.text.append(element);
      this.spans.push({ element, tokens: this.pending });
      this.pending = [];
    }
    if (ids.length) this.time();
  }

  time() {
    const now = performance.now();
    this.first ??= now;
    const count = this.tokens.length;
    const seconds = (now - this.first) / 1000;
    // The speed of an answer that comes in one piece is unknown.
    const rate = seconds > 0 ? ` · ${((count - 1) / seconds).toFixed(1)} tokens/s` : "";
    this.element.querySelector(".figures").textContent = `${count} token${count > 1 ? "s" : ""}${rate}`;
  }

  // The log-probabilities of this answer under the base model, which scores it without generating.
  async compare(signal) {
    const start = this.promptIds.length;
    const prompt = [...this.promptIds, ...this.tokens.map((token) => token.id)];
    const body = { model: base, adapters: {}, prompt, echo: true, max_tokens: 0, logprobs: 0 };
    const { choices } = await (await call("v1/completions", body, signal)).json();
    const values = choices[0].logprobs.token_logprobs.slice(start);
    this.tokens.forEach((token, at) => { token.base = values[at]; });
    for (const span of this.spans) {
      const difference = total(span.tokens, "own") - total(span.tokens, "base");
      span.element.className = difference > 0 ? "more" : "less";
      span.element.style.setProperty("--strength", Math.min(Math.abs(difference) / FULL_COLOUR, 1).toFixed(3));
    }
    const mean = (total(this.tokens, "own") - total(this.tokens, "base")) / this.tokens.length;
    this.readout.textContent = `${signed(mean)} nats per token relative to the base`;
  }

  step(event) {
    const by = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined || !this.spans.length) return;
    event.preventDefault();
    const at = this.at === undefined ? 0 : this.at + by;
    this.show(Math.min(Math.max(at, 0), this.spans.length - 1));
  }

  point(event) {
    const at = this.spans.findIndex((span) => span.element === event.target);
    if (at >= 0) this.show(at);
  }

  show(at) {
    this.spans[this.at]?.element.classList.remove("current");
    this.at = at;
    const span = this.spans[at];
    span.element.classList.add("current");
    const word = JSON.stringify(span.element.textContent);
    const own = total(span.tokens, "own");
    const other = total(span.tokens, "base");
    const compared = Number.isNaN(other) ? "" : `, base ${percent(other)}: ${factor(own - other)}`;
    this.readout.textContent = `${word}: ${this.adapted ? "adapter" : "base"} ${percent(own)}${compared}`;
  }

  fail(error) {
    this.failed = true;
    const text = document.createElement("p");
    text.className = "error";
    text.setAttribute("role", "alert");
    text.textContent = error.message;
    this.readout.before(text);
  }
}

const total = (tokens, whose) => tokens.reduce((sum, token) => sum + token[whose], 0);
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  if (value < 0.01) return "below 0.01%";
  return `${value < 1 || value > 99 ? value.toFixed(2) : value.toPrecision(3)}%`;
}

function factor(difference) {
  const times = Math.exp(Math.abs(difference));
  if (times < 1.05) return "equally likely";
  const shown = times < 10 ? times.toFixed(1) : Math.round(times).toLocaleString("en");
  return `${shown} times ${difference > 0 ? "more likely" : "less likely"}`;
}

function outcome(cards) {
  const failed = cards.filter((card) => card.failed).length;
  if (!failed) return "Done";
  return failed === cards.length ? "Failed" : `Done, ${failed} of ${cards.length} failed`;
}

async function compare() {
  const answers = wantedAnswers();
  if (running) return;
  if (!answers.length) { $("status").textContent = "Choose the base model or an adapter."; return; }
  running = new AbortController();
  const cards = answers.map((answer) => new Card(answer));
  $("answers").replaceChildren(...cards.map((card) => card.element));
  $("run").disabled = true;
  $("halt").hidden = false;
  $("status").textContent = `${cards.length} answer${cards.length > 1 ? "s" : ""} running`;
  const chat = document.querySelector("[name=mode]:checked").value === "chat";
  const { signal } = running;
  await Promise.all(cards.map((card) => card.run($("prompt").value, chat, sampling(), signal)));
  $("status").textContent = signal.aborted ? "Stopped" : outcome(cards);
  if ($("answers").contains(document.activeElement) === false && document.activeElement === $("halt")) $("run").focus();
  $("run").disabled = false;
  $("halt").hidden = true;
  running = null;
}

async function start() {
  try {
    await showModels();
    $("key-form").hidden = true;
  } catch (error) {
    $("key-form").hidden = error.status !== 401;
    if (error.status === 401) $("key").focus();
    $("status").textContent = error.message;
  }
}

$("compare").addEventListener("submit", (event) => { event.preventDefault(); compare(); });
$("halt").addEventListener("click", () => running?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("compare").requestSubmit();
});
$("prompt").value ||= sessionStorage.getItem("graft-prompt") || "";
$("prompt").addEventListener("input", () => sessionStorage.setItem("graft-prompt", $("prompt").value));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  sessionStorage.setItem("graft-key", key);
  $("status").textContent = "";
  start();
});
$("colour").addEventListener("change", () => $("answers").classList.toggle("coloured", $("colour").checked));
document.querySelector(".settings").addEventListener("input", summarize);
$("answers").classList.toggle("coloured", $("colour").checked);
summarize();
start();
