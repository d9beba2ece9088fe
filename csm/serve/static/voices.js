// The voices to choose from: the server's, and recordings that stay in this page.

import { request } from "./api.js";

const BUILT_IN = /^speaker_(\d+)$/;

export class Voices {
  constructor() {
    this.server = [];
    this.page = new Map(); // name: { text, audio } with the recording in Base64
    this.writable = false;
  }

  async load() {
    const list = await request("/v1/audio/voices");
    this.writable = list.writable;
    this.server = list.voices.filter((voice) => voice.custom || BUILT_IN.test(voice.id)).map((voice) => voice.id);
  }

  fill(select, chosen) {
    const label = (id) => (BUILT_IN.test(id) ? `Speaker ${Number(id.match(BUILT_IN)[1]) + 1}` : id);
    const option = (id) => new Option(label(id), id, false, id === chosen);
    select.replaceChildren(...[...this.page.keys()].map(option), ...this.server.map(option));
  }

  // Speaker ids for the two voices of a conversation: different ones for different voices.
  static speakers(a, b) {
    const own = (id) => (BUILT_IN.test(id) ? Number(id.match(BUILT_IN)[1]) : null);
    const other = (taken) => (taken === 0 ? 1 : 0);
    const first = own(a) ?? other(own(b));
    return [first, a === b ? first : own(b) ?? other(first)];
  }

  // The fields of start for a voice. A recording of this page goes along as context, with its first turn.
  fields(id, speaker, first) {
    const recording = this.page.get(id);
    if (!recording) return speaker === undefined ? { voice: id } : { voice: id, speaker };
    const turn = { ...recording, speaker: speaker ?? 0 };
    return { voice: "speaker_0", speaker: turn.speaker, context: first ? [turn] : [] };
  }
}
