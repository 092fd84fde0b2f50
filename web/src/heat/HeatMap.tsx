// A heat map that is looked at with mouse or keys: a cursor over cells, panning and zooming along the columns, a line that reads the cell out.
import { useEffect, useLayoutEffect, useRef, useState } from 'preact/hooks';
import { shown, themed, type Scale } from '../colour';
import { kinds, paint, type Grid, type View } from './paint';
import { Legend } from './Legend';

export interface Cell {
  row: number;
  column: number;
}

export interface HeatMapProps {
  name: string; // what it shows, and along which way
  grid: Grid;
  scale: Scale;
  rowLabel: (row: number) => string; // short, beside the map
  rowName?: (row: number) => string; // as it is read out
  columnLabel?: (column: number) => string; // short, under the map; its number unless given
  columnName: (column: number) => string;
  unit?: string; // what a value is
  missing?: (cell: Cell) => string; // why a cell has no value
  cursor?: Cell | null;
  onCursor?: (cell: Cell) => void; // who does not ask leaves the cursor to the map
  onOpen?: (cell: Cell) => void;
  height?: number;
  square?: boolean;
}

const GUTTER = 64;
const FOOT = 18;

const px = (n: number) => `${n}px`;
const clamp = (v: number, low: number, high: number) => Math.min(Math.max(v, low), high);

export function HeatMap(p: HeatMapProps) {
  const { grid, scale } = p;
  const [own, setOwn] = useState<Cell | null>(null);
  const onCursor = p.onCursor ?? setOwn;
  const at = p.onCursor ? (p.cursor ?? null) : own;
  const cursor = at && at.row < grid.height && at.column < grid.width ? at : null;
  const box = useRef<HTMLDivElement>(null);
  const cells = useRef<HTMLCanvasElement>(null);
  const over = useRef<HTMLCanvasElement>(null);
  const image = useRef<ImageData | null>(null);
  const [hover, setHover] = useState<Cell | null>(null);
  const [width, setWidth] = useState(0);
  const [span, setSpan] = useState<{ x0: number; x1: number }>({ x0: 0, x1: Math.max(1, grid.width) });
  const [theme, setTheme] = useState(0);
  const drag = useRef<{ from: number; x0: number; moved: boolean } | null>(null);
  const height = p.square ? Math.max(120, Math.min(width - GUTTER, 560)) : (p.height ?? clamp(grid.height * 12, 96, 480));
  const inner = Math.max(1, (p.square ? height + GUTTER : width) - GUTTER);

  useEffect(() => setSpan({ x0: 0, x1: Math.max(1, grid.width) }), [grid.width]);
  useLayoutEffect(() => {
    const element = box.current;
    if (!element) return;
    const watch = new ResizeObserver(() => setWidth(element.clientWidth));
    watch.observe(element);
    setWidth(element.clientWidth);
    const dark = matchMedia('(prefers-color-scheme: dark)');
    const changed = () => setTheme((n) => n + 1);
    dark.addEventListener('change', changed);
    addEventListener('dmi-theme', changed);
    return () => {
      watch.disconnect();
      dark.removeEventListener('change', changed);
      removeEventListener('dmi-theme', changed);
    };
  }, []);
  useEffect(() => {
    const element = box.current;
    if (!element || width === 0 || grid.width === 0 || grid.height === 0) return;
    const frame = requestAnimationFrame(() => {
      const canvas = cells.current;
      const pen = canvas?.getContext('2d', { alpha: false });
      if (!canvas || !pen || !over.current) return;
      const ratio = devicePixelRatio || 1;
      const want: [number, number] = [Math.round(inner * ratio), Math.round(height * ratio)];
      if (canvas.width !== want[0] || canvas.height !== want[1]) [canvas.width, canvas.height] = want;
      const pixels = (image.current = image.current?.width === want[0] && image.current.height === want[1] ? image.current : pen.createImageData(...want));
      paint({ width: want[0], height: want[1], data: new Uint32Array(pixels.data.buffer) }, grid, span, scale, themed(element, '--paper'), themed(element, '--faint'));
      pen.putImageData(pixels, 0, 0);
      paintOver(over.current, element, p, span, inner, height, hover ?? cursor, ratio);
    });
    return () => cancelAnimationFrame(frame);
  }, [grid, scale, span.x0, span.x1, width, height, inner, cursor?.row, cursor?.column, hover?.row, hover?.column, theme]);

  const cellAt = (event: MouseEvent): Cell | null => {
    const bounds = cells.current?.getBoundingClientRect();
    if (!bounds || grid.width === 0 || grid.height === 0) return null;
    const column = Math.floor(span.x0 + ((event.clientX - bounds.left) / bounds.width) * (span.x1 - span.x0));
    const row = Math.floor(((event.clientY - bounds.top) / bounds.height) * grid.height);
    return column < 0 || column >= grid.width || row < 0 || row >= grid.height ? null : { row, column };
  };
  const move = (x0: number, length: number) => {
    const n = clamp(length, Math.min(8, grid.width), grid.width);
    const from = clamp(x0, 0, grid.width - n);
    setSpan({ x0: from, x1: from + n });
  };
  const zoom = (factor: number, around: number) => move(around - (around - span.x0) * factor, (span.x1 - span.x0) * factor);
  const step = (dr: number, dc: number) => {
    const from = cursor ?? { row: 0, column: Math.floor(span.x0) };
    const to = { row: clamp(from.row + dr, 0, grid.height - 1), column: clamp(from.column + dc, 0, grid.width - 1) };
    if (to.column < span.x0 || to.column + 1 > span.x1) move(to.column - (span.x1 - span.x0) / 2, span.x1 - span.x0);
    onCursor(to);
  };
  const onKey = (event: KeyboardEvent) => {
    const far = event.shiftKey ? 10 : 1;
    const moves: Record<string, () => void> = {
      ArrowLeft: () => step(0, -far), ArrowRight: () => step(0, far), ArrowUp: () => step(-far, 0), ArrowDown: () => step(far, 0),
      Home: () => step(0, -grid.width), End: () => step(0, grid.width), PageUp: () => step(-grid.height, 0), PageDown: () => step(grid.height, 0),
      '+': () => zoom(0.5, cursor?.column ?? span.x0), '=': () => zoom(0.5, cursor?.column ?? span.x0), '-': () => zoom(2, cursor?.column ?? span.x0),
      Enter: () => cursor && p.onOpen?.(cursor), ' ': () => cursor && p.onOpen?.(cursor),
    };
    const act = moves[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey || grid.width === 0) return;
    event.preventDefault();
    act();
  };
  const read = hover ?? cursor;
  return (
    <div class="heat">
      <p class="heat-name quiet" aria-hidden="true">{p.name}</p>
      <div ref={box} class="heat-box" tabIndex={0} role="application" aria-roledescription="heat map" aria-label={`${p.name}. Arrows move, Enter opens, plus and minus zoom.`} onKeyDown={onKey}
        style={{ height: px(height + FOOT) }}
        onWheel={(event: WheelEvent) => {
          if (!event.ctrlKey && !event.shiftKey && !event.deltaX) return; // the page scrolls
          event.preventDefault();
          const cell = cellAt(event);
          if (event.ctrlKey) zoom(event.deltaY > 0 ? 1.25 : 0.8, cell?.column ?? span.x0);
          else move(span.x0 + ((event.deltaX || event.deltaY) / inner) * (span.x1 - span.x0), span.x1 - span.x0);
        }}
        onPointerDown={(event: PointerEvent) => { drag.current = { from: event.clientX, x0: span.x0, moved: false }; }}
        onPointerMove={(event: PointerEvent) => {
          const held = drag.current;
          if (held && event.buttons & 1 && Math.abs(event.clientX - held.from) > 4) {
            held.moved = true;
            move(held.x0 - ((event.clientX - held.from) / inner) * (span.x1 - span.x0), span.x1 - span.x0);
          }
          setHover(cellAt(event));
        }}
        onPointerLeave={() => setHover(null)}
        onPointerUp={(event: PointerEvent) => {
          const moved = drag.current?.moved;
          drag.current = null;
          const cell = cellAt(event);
          if (moved || !cell) return;
          onCursor(cell);
          p.onOpen?.(cell);
        }}>
        <canvas ref={cells} class="heat-cells" style={{ left: px(GUTTER), width: px(inner), height: px(height) }} data-rows={grid.height} data-columns={grid.width} data-x0={span.x0} data-x1={span.x1} />
        <canvas ref={over} class="heat-over" style={{ width: px(inner + GUTTER), height: px(height + FOOT) }} />
      </div>
      <div class="heat-foot">
        <Legend scale={scale} {...(p.unit ? { unit: p.unit } : {})} />
        <output class="readout" aria-live="polite">{read ? sayCell(p, read) : 'Click a cell, or focus the map and use the arrow keys.'}</output>
      </div>
    </div>
  );
}

function sayCell(p: HeatMapProps, cell: Cell): string {
  const at = cell.row * p.grid.width + cell.column;
  const kind = kinds[p.grid.kinds[at] ?? 0] ?? 'value';
  const where = `${(p.rowName ?? p.rowLabel)(cell.row)}, ${p.columnName(cell.column)}`;
  if (kind !== 'value') return `${where}: no value: ${p.missing?.(cell) ?? kind.replace('_', ' ')}`;
  return `${where}: ${p.unit ? `${p.unit} = ` : ''}${shown(p.grid.values[at] ?? NaN)}`;
}

function paintOver(canvas: HTMLCanvasElement, element: HTMLElement, p: HeatMapProps, view: View, inner: number, height: number, cursor: Cell | null, ratio: number): void {
  const width = inner + GUTTER;
  const want: [number, number] = [Math.round(width * ratio), Math.round((height + FOOT) * ratio)];
  if (canvas.width !== want[0] || canvas.height !== want[1]) [canvas.width, canvas.height] = want; // that makes a new bitmap: not on every frame of a pan
  const draw = canvas.getContext('2d');
  if (!draw) return;
  const style = getComputedStyle(element);
  draw.setTransform(ratio, 0, 0, ratio, 0, 0);
  draw.clearRect(0, 0, width, height + FOOT);
  draw.font = '11px system-ui, sans-serif';
  draw.fillStyle = style.getPropertyValue('--quiet');
  draw.textAlign = 'right';
  draw.textBaseline = 'middle';
  const rowHeight = height / p.grid.height;
  const every = Math.max(1, Math.ceil(13 / rowHeight));
  for (let row = 0; row < p.grid.height; row += every) draw.fillText(p.rowLabel(row), GUTTER - 6, (row + 0.5) * rowHeight, GUTTER - 8);
  draw.textAlign = 'left';
  draw.textBaseline = 'top';
  const columnWidth = inner / (view.x1 - view.x0);
  const stride = Math.max(1, Math.ceil(48 / columnWidth));
  for (let column = Math.ceil(view.x0 / stride) * stride; column < view.x1; column += stride) {
    draw.fillText(p.columnLabel?.(column) ?? String(column), GUTTER + (column - view.x0) * columnWidth + 1, height + 4);
  }
  if (!cursor) return;
  draw.save();
  const x = GUTTER + (cursor.column - view.x0) * columnWidth;
  const [w, h] = [Math.max(3, columnWidth), Math.max(3, rowHeight)];
  draw.beginPath();
  draw.rect(GUTTER, 0, inner, height);
  draw.clip();
  draw.lineWidth = 3;
  draw.strokeStyle = style.getPropertyValue('--paper');
  draw.strokeRect(x, cursor.row * rowHeight, w, h);
  draw.lineWidth = 1.5;
  draw.strokeStyle = style.getPropertyValue('--accent');
  draw.strokeRect(x, cursor.row * rowHeight, w, h);
  draw.restore();
}
