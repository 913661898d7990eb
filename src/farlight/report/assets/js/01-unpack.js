/* Decoding of packed data: base64 of zlib-compressed bytes, inflated by the browser's DecompressionStream. */
"use strict";
const FL = (window.farlight = {});

(() => {
  const KINDS = { i4: Int32Array, u2: Uint16Array, u1: Uint8Array, f4: Float32Array };

  async function inflate(data) {
    const raw = atob(data);
    const bytes = new Uint8Array(raw.length);
    for (let x = 0; x < raw.length; x++) bytes[x] = raw.charCodeAt(x);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  }

  /* A plain list unchanged, packed numbers as a typed array, a packed text as a string. */
  FL.unpack = async (packed) => {
    if (packed === null || Array.isArray(packed)) return packed;
    const buffer = await inflate(packed.data);
    return packed.kind === "text" ? new TextDecoder().decode(buffer) : new KINDS[packed.kind](buffer);
  };

  /* A copy of the tree with every packed value decoded. */
  FL.unpackAll = async (value) => {
    if (value === null || typeof value !== "object") return value;
    if (typeof value.data === "string" && typeof value.kind === "string") return FL.unpack(value);
    if (Array.isArray(value)) {
      return value.length && typeof value[0] === "object" ? Promise.all(value.map(FL.unpackAll)) : value;
    }
    const out = {};
    for (const [name, inner] of Object.entries(value)) out[name] = await FL.unpackAll(inner);
    return out;
  };

  /* Yields to the event loop. Long loops call it about every 14 ms and stop when their `alive()` is false. */
  FL.breathe = () => new Promise((go) => setTimeout(go, 0));
})();
