// Tokens as they are written: each stands for itself, what cannot be seen for a sign or its number.
import type { RequestInfo } from './engine';

const signs: Record<string, string> = { ' ': '␣', '\n': '⏎', '\t': '⇥', '\r': '␍' };

/** A text in which every character can be seen: white space, control characters and the like as signs, or as their number. */
export const visible = (text: string): string => text.replace(/[\p{Z}\p{C}]/gu, (c) => signs[c] ?? `\\u{${c.codePointAt(0)?.toString(16)}}`) || '∅';

/** How a token of a request is written: its text where it was kept, else its id. */
export function tokenText(request: RequestInfo, position: number): string {
  const piece = request.pieces?.[position];
  if (piece !== undefined) return visible(piece);
  const id = request.tokens?.[position];
  return id === undefined ? `·` : String(id);
}
