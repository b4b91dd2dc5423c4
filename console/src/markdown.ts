// Markdown that agents write. It is not trusted: a short list of elements remains, and nothing is loaded.
import DOMPurify from "dompurify";
import { Marked } from "marked";
import { plain } from "./ansi";

const MARKDOWN_CHARS_MAX = 50_000;
/** Quotes and lists nested deeper than people write take seconds to parse, or overflow the stack. */
const TOO_DEEP = /^(?:[ \t]*(?:>|(?:[-*+]|\d{1,9}[.)])[ \t])){16}|^[ \t]{80}/m;

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    // An image is a request to another host: it is shown as a link.
    image({ href, text }) {
      const escape = (part: string) => part.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
      return `<a href="${escape(href)}">${escape(text || href)}</a>`;
    },
    // HTML is shown as it was written.
    html({ text }) {
      return text.replace(/[&<>]/g, (c) => `&#${c.charCodeAt(0)};`);
    },
  },
});

const TAGS = "p br strong em del code pre ul ol li blockquote h1 h2 h3 h4 h5 h6 table thead tbody tr th td a hr".split(" ");

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

/** None where the text is too long or too deeply nested: it is shown as it was written. */
export function render(text: string): DocumentFragment | null {
  if (text.length > MARKDOWN_CHARS_MAX || TOO_DEEP.test(text)) return null;
  let html: string;
  try {
    html = marked.parse(plain(text), { async: false });
  } catch {
    return null;
  }
  return DOMPurify.sanitize(html, {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ["href", "start", "align"],
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
    RETURN_DOM_FRAGMENT: true,
  });
}
