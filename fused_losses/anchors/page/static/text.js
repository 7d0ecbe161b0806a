// Text of a model for the eye: nothing is invisible, and everything stays text.

const PICTURES = { "\n": "↵", "\r": "␍", "\t": "⇥" };
// Controls, invisible and direction-changing characters, and what no font has.
const RANGES =
  "\\u0000-\\u001f\\u007f-\\u009f\\u00ad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180e\\u200b-\\u200f" +
  "\\u2028-\\u202e\\u2060-\\u206f\\u3164\\ufeff\\uffa0\\ufff9-\\ufffb";
const HIDDEN = new RegExp(`[${RANGES}]`, "gu");

export function picture(character) {
  if (PICTURES[character]) return PICTURES[character];
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  return `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`;
}

const visible = (text) => text.replace(HIDDEN, picture);

// How a token is shown: blanks before it, its face, whether that is a picture, line breaks after it, blanks after them.
export function face(token) {
  const shown = { before: "", text: "", picture: true, breaks: 0, after: "" };
  if (token.name && (token.special || !token.text)) return { ...shown, text: visible(token.name) };
  if (/^ +$/.test(token.text)) {
    const wide = token.text.length;
    return { ...shown, text: wide > 3 ? `␣×${wide}` : "␣".repeat(wide) };
  }
  const [, before, rest] = /^( *)([^]*)$/.exec(token.text);
  const [, body, after] = /^([^]*?)((?<=\n) *)$/.exec(rest) ?? [rest, rest, ""];
  const breaks = (body.match(/\n/g) || []).length;
  if (token.text.includes("\ufffd") && token.name) return { ...shown, before, text: token.name };
  return { before, text: visible(body), picture: !body.trim(), breaks, after };
}

// In a sentence: “ Aurora”, with its blanks.
export function quoted(token) {
  const text = visible(token.text || token.name || "");
  return `“${/^ +$/.test(text) ? "␣".repeat(text.length) : text}”`;
}

const WIDE = /[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\u{1f000}-\u{1faff}\u{20000}-\u{3ffff}]/u;

// Whether a line may break before this token.
export function startsWord(token, last) {
  if (!last || token.special || last.special) return true;
  return (
    /^\s/.test(token.text) ||
    /[\s\-/]$/.test(last.text) ||
    (WIDE.test(token.text) && !token.part) ||
    WIDE.test(last.text)
  );
}

export function percent(p) {
  if (p >= 0.9995) return "100 %";
  if (p >= 0.1) return `${(100 * p).toFixed(p >= 0.995 ? 1 : 0)} %`;
  if (p >= 0.001) return `${(100 * p).toFixed(p >= 0.01 ? 1 : 2)} %`;
  if (p >= 0.0001) return `${(100 * p).toFixed(3)} %`;
  return p > 0 ? `${(100 * p).toExponential(0).replace("e-", "·10⁻").replace(/\d+$/, superscript)} %` : "0 %";
}

const superscript = (digits) => [...digits].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");

// Words of two texts, each with whether the other has it too, in order.
export function differences(one, other) {
  const a = one.split(/(?<=\s)/u).slice(0, 1500);
  const b = other.split(/(?<=\s)/u).slice(0, 1500);
  const same = (x, y) => x.trim() === y.trim();
  const length = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      length[i][j] = same(a[i], b[j]) ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
  const found = [];
  for (let i = 0, j = 0; i < a.length; i++) {
    while (
      j < b.length &&
      !same(a[i], b[j]) &&
      length[i][j + 1] >= length[i + 1][j] &&
      length[i][j + 1] === length[i][j]
    )
      j++;
    const kept = j < b.length && same(a[i], b[j]);
    found.push([visible(a[i]).replaceAll("↵", "\n"), kept]);
    if (kept) j++;
  }
  return found;
}
