// Every head of every layer as a small picture, to be chosen from with mouse or arrow keys.
import { useEffect, useMemo, useRef, useState } from 'preact/hooks';
import { table, themed } from '../colour';
import { packed } from '../heat/paint';
import type { Tensor } from '../engine';
import { shortRow } from '../sites';

const GAP = 3;
const LABEL = 30;

export interface Head { layer: number; head: number }

/** layers[i] is the layer of row i. Weights are drawn by their square root, so that the weak ones show. */
export function Thumbnails({ pictures, chosen, onChoose, describe }: { pictures: Tensor; chosen: Head; onChoose: (head: Head) => void; describe: (head: Head) => string }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const box = useRef<HTMLDivElement>(null);
  const [hover, setHover] = useState<Head | null>(null);
  const [sites = 0, heads = 0, side = 0] = pictures.shape;
  const layers = useMemo(() => pictures.sites.map((site) => Number(shortRow(site))), [pictures]);
  const scale = side >= 32 ? 1 : Math.max(1, Math.floor(32 / Math.max(1, side)));
  const pitch = side * scale + GAP;
  useEffect(() => {
    const element = canvas.current;
    const draw = element?.getContext('2d');
    if (!element || !draw || side === 0) return;
    const paint = () => {
      [element.width, element.height] = [LABEL + heads * pitch, sites * pitch];
      const style = getComputedStyle(element);
      draw.fillStyle = style.getPropertyValue('--paper');
      draw.fillRect(0, 0, element.width, element.height);
      const colours = new Uint32Array(table('amount').buffer);
      const picture = new ImageData(side * scale, side * scale);
      const pixels = new Uint32Array(picture.data.buffer);
      const blank = packed(themed(element, '--line'));
      for (let site = 0; site < sites; site++) {
        for (let head = 0; head < heads; head++) {
          const at = (site * heads + head) * side * side;
          for (let to = 0, y = 0; y < side * scale; y++) {
            const line = at + Math.floor(y / scale) * side;
            for (let x = 0; x < side * scale; x++, to++) {
              const value = pictures.values[line + Math.floor(x / scale)] as number;
              pixels[to] = Number.isNaN(value) ? blank : (colours[Math.round(Math.sqrt(Math.min(1, Math.max(0, value))) * 255)] as number);
            }
          }
          draw.putImageData(picture, LABEL + head * pitch, site * pitch);
        }
        draw.fillStyle = style.getPropertyValue('--quiet');
        draw.font = '11px system-ui, sans-serif';
        draw.textAlign = 'right';
        draw.textBaseline = 'middle';
        draw.fillText(String(layers[site]), LABEL - 6, site * pitch + pitch / 2);
      }
    };
    paint();
    addEventListener('dmi-theme', paint);
    return () => removeEventListener('dmi-theme', paint);
  }, [pictures]);
  const row = layers.indexOf(chosen.layer);
  useEffect(() => {
    if (box.current && row >= 0) {
      const top = row * pitch;
      const { scrollTop, clientHeight } = box.current;
      if (top < scrollTop || top + pitch > scrollTop + clientHeight) box.current.scrollTop = top - clientHeight / 2;
    }
  }, [row, pitch]);
  const at = (event: MouseEvent): Head | null => {
    const bounds = canvas.current?.getBoundingClientRect();
    if (!bounds) return null;
    const [head, site] = [Math.floor((event.clientX - bounds.left - LABEL) / pitch), Math.floor((event.clientY - bounds.top) / pitch)];
    const layer = layers[site];
    return head < 0 || head >= heads || layer === undefined ? null : { layer, head };
  };
  const onKey = (event: KeyboardEvent) => {
    const steps: Record<string, [number, number]> = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const layer = layers[Math.min(sites - 1, Math.max(0, row + step[0]))];
    if (layer !== undefined) onChoose({ layer, head: Math.min(heads - 1, Math.max(0, chosen.head + step[1])) });
  };
  return (
    <div class="thumbs">
      <div ref={box} class="thumbs-box" tabIndex={0} role="application" aria-roledescription="table of pictures" aria-label={`Attention of ${heads} heads in ${sites} layers. Arrows choose a head.`}
        onKeyDown={onKey} onPointerMove={(event: PointerEvent) => setHover(at(event))} onPointerLeave={() => setHover(null)}
        onClick={(event: MouseEvent) => { const head = at(event); if (head) onChoose(head); }}>
        <canvas ref={canvas} class="thumbs-canvas" data-side={side} data-scale={scale} data-gap={GAP} data-label={LABEL} />
        {row >= 0 && <span class="thumbs-mark" style={{ left: `${LABEL + chosen.head * pitch - 2}px`, top: `${row * pitch - 2}px`, width: `${pitch}px`, height: `${pitch}px` }} />}
      </div>
      <output class="readout" aria-live="polite">{describe(hover ?? chosen)}</output>
    </div>
  );
}
