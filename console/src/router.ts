// The address bar: paths below /console/, changed without loading the page again.
import { signal } from "@preact/signals";

const BASE = "/console";

export const path = signal(current());

function current(): string {
  return location.pathname.slice(BASE.length).replace(/\/+$/, "") || "/";
}

export const href = (to: string): string => `${BASE}${to}`;

export function go(to: string, replace = false): void {
  if (href(to) === location.pathname) return;
  history[replace ? "replaceState" : "pushState"](null, "", href(to));
  path.value = current();
  window.scrollTo(0, 0);
}

addEventListener("popstate", () => (path.value = current()));

// Plain clicks on our own links.
document.addEventListener("click", (event) => {
  if (event.defaultPrevented || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
  const link = (event.target as Element).closest?.("a");
  if (!link || link.target || link.origin !== location.origin || !link.pathname.startsWith(`${BASE}/`)) return;
  event.preventDefault();
  go(link.pathname.slice(BASE.length));
});
