import { useEffect, useRef } from 'preact/hooks';
import { shown, table, themed, type Scale } from '../colour';
import { patch, type Kind } from './paint';

/** Which colour is which value. */
export function Legend({ scale, unit }: { scale: Scale; unit?: string }) {
  const bar = useRef<HTMLCanvasElement>(null);
  useEffect(() => {
    const draw = bar.current?.getContext('2d');
    if (!draw) return;
    draw.putImageData(new ImageData(new Uint8ClampedArray(table(scale.map)), 256, 1), 0, 0);
  }, [scale.map]);
  return (
    <span class="legend">
      {unit && <b>{unit}</b>} <span data-low={scale.low}>{shown(scale.low)}</span>
      <canvas ref={bar} width={256} height={1} aria-hidden="true" />
      <span data-high={scale.high}>{shown(scale.high)}</span>
      {scale.log && <span class="quiet">logarithmic</span>}
    </span>
  );
}

/** Why cells have no value, how many of each, and how these are drawn. */
export type Reason = [text: string, rows: number, kind: Kind];

export function MissingLegend({ reasons }: { reasons: Reason[] }) {
  if (reasons.length === 0) return null;
  return (
    <p class="quiet missing" data-missing>
      <span>No value where hatched:</span>
      {reasons.map(([reason, rows, kind]) => <span key={`${kind} ${reason}`} data-kind-of-missing={kind}><Swatch kind={kind} /> {reason}: {rows} {rows === 1 ? 'row' : 'rows'}</span>)}
    </p>
  );
}

function Swatch({ kind }: { kind: Kind }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  useEffect(() => {
    const paint = () => {
      const element = canvas.current;
      const pen = element?.getContext('2d');
      if (!element || !pen) return;
      const image = pen.createImageData(element.width, element.height);
      patch({ width: image.width, height: image.height, data: new Uint32Array(image.data.buffer) }, kind, themed(element, '--paper'), themed(element, '--faint'));
      pen.putImageData(image, 0, 0);
    };
    paint();
    const dark = matchMedia('(prefers-color-scheme: dark)');
    dark.addEventListener('change', paint);
    addEventListener('dmi-theme', paint);
    return () => {
      dark.removeEventListener('change', paint);
      removeEventListener('dmi-theme', paint);
    };
  }, [kind]);
  return <canvas ref={canvas} class="swatch" width={24} height={12} aria-hidden="true" />;
}
