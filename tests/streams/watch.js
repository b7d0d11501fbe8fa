/** What a listener was given of each text, held against what the agent writes. */
export class Watch {
  texts = new Map(); // by the streams' ids

  /** `late`: the page may come in the middle of texts. */
  constructor(name, expected, say, late = false) {
    Object.assign(this, { name, expected, say, late });
  }

  /** `from`: 0, but for a page that has come in the text's middle. */
  take({ id, messageId, text, state, from = 0 }) {
    const attempt = Number(id.split('.').at(-1));
    const whole = this.expected[messageId]?.[attempt - 1]?.slice(from);
    const before = this.texts.get(id);
    const fault = (what) => this.say({ fault: `${this.name}, ${messageId}, attempt ${attempt}: ${what}: ${JSON.stringify({ text, state, before, whole })}` });
    if (whole === undefined) fault('nobody writes this');
    else if (from && !this.late) fault('not from its beginning');
    else if (!whole.startsWith(text)) fault('no prefix of what the agent writes');
    else if (before && before.from !== from) fault('it has begun elsewhere');
    else if (before && !text.startsWith(before.text)) fault('what was shown before has changed');
    else if (before?.state) fault('it had ended');
    else if (state === 'done' && text !== whole) fault('it is done, and not whole');
    this.texts.set(id, { text, state, from });
  }

  /** What is missing of the logged texts `{id: {text, states}}`. */
  *missing(logged) {
    for (const [id, { text, states }] of Object.entries(logged)) {
      const has = this.texts.get(id);
      if (!has && this.late) continue; // it was over before
      const same = has && states.includes(has.state) && (has.state === 'superseded' || has.text === text.slice(has.from));
      if (!same) yield `${this.name}, stream ${id}: ${JSON.stringify(has)} where ${JSON.stringify({ text, states })} is due`;
    }
  }
}
