import { defineConfig } from "vite";

export default defineConfig({
  base: "/console/",
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  build: {
    target: "es2022",
    // The folder's .gitkeep stays: the gateway's build script watches the folder.
    emptyOutDir: false,
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0,
    reportCompressedSize: false,
  },
  // `npm run dev` beside a stack of `aod dev`.
  server: { proxy: { "^/(?!console/(?!session$))": process.env.AOD_API_URL ?? "http://127.0.0.1:8777" } },
});
