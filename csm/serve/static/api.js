// Requests to this server, with the API key if there is one. The key is kept in sessionStorage only.

const STORE = "csm-key";

export function apiKey() {
  return sessionStorage.getItem(STORE) || "";
}

export function keepKey(key) {
  sessionStorage.setItem(STORE, key);
}

export class Unauthorized extends Error {}

// The JSON of a response. Throws Unauthorized, or an Error with the server's message.
export async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  if (apiKey()) headers.set("Authorization", `Bearer ${apiKey()}`);
  const response = await fetch(path, { ...options, headers });
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) throw new Unauthorized("The key is not right.");
  if (!response.ok) throw new Error(body.error?.message || `The server answered ${response.status}.`);
  return body;
}

// A browser cannot set the headers of a WebSocket: the key travels as a subprotocol (docs/websocket.md).
function subprotocols() {
  if (!apiKey()) return ["csm.v1"];
  const base64 = btoa(apiKey()).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return ["csm.v1", `csm.key.${base64}`];
}

const PIECE = 2000; // characters of a message: at most 4,096 are allowed

function* pieces(text) {
  const characters = Array.from(text); // never half of a surrogate pair
  for (let at = 0; at < characters.length; at += PIECE) yield characters.slice(at, at + PIECE).join("");
}

// One conversation over a WebSocket. onAudio gets Float32Array samples, onClause the event.
export class Stream {
  constructor(onAudio, onClause) {
    this.onAudio = onAudio;
    this.onClause = onClause;
    this.sampleRate = 24000;
  }

  open() {
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    this.socket = new WebSocket(`${scheme}//${location.host}/v1/audio/stream`, subprotocols());
    this.socket.binaryType = "arraybuffer";
    return new Promise((resolve, reject) => {
      this.pending = { resolve, reject };
      this.socket.onmessage = (event) => this.receive(event.data);
      this.socket.onclose = (event) => this.fail(event.reason || "The connection to the server was closed.");
    });
  }

  receive(data) {
    if (data instanceof ArrayBuffer) {
      const samples = new Int16Array(data);
      this.onAudio(Float32Array.from(samples, (sample) => sample / 32768));
      return;
    }
    const event = JSON.parse(data);
    if (event.type === "clause") this.onClause(event);
    else if (event.type === "error") this.fail(event.error.message);
    else if (event.type === "ready") {
      this.sampleRate = event.sample_rate;
      this.settle(event);
    } else if (event.type === "done" || event.type === "cancelled") this.settle(event);
    else if (event.type === "started") this.seed = event.seed;
  }

  settle(event) {
    const pending = this.pending;
    this.pending = null;
    pending?.resolve(event);
  }

  fail(message) {
    const pending = this.pending;
    this.pending = null;
    pending?.reject(new Error(message));
  }

  send(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  // One turn: resolves with the event that ended it, done or cancelled.
  speak(fields, text) {
    return new Promise((resolve, reject) => {
      this.pending = { resolve, reject };
      this.send({ type: "start", split: "sentence", ...fields });
      for (const piece of pieces(text)) this.send({ type: "text", text: piece });
      this.send({ type: "end" });
    });
  }

  cancel(played) {
    this.send({ type: "cancel", played });
  }

  close() {
    this.socket.onclose = null;
    this.socket.close();
  }
}
