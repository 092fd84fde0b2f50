import { defineConfig } from 'vite';

// Everything that the page needs is in dist/: nothing is inlined, as the policy under which it is served forbids what is inline.
export default defineConfig({
  oxc: { jsx: { runtime: 'automatic', importSource: 'preact' } },
  build: { outDir: 'dist', emptyOutDir: false, assetsInlineLimit: 0, modulePreload: { polyfill: false }, target: 'es2022', reportCompressedSize: true },
});
