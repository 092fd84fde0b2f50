import { useEffect, useRef } from 'preact/hooks';
import { shown, table, type Scale } from '../colour';

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

/** How missing cells are drawn. */
export function MissingLegend({ reasons }: { reasons: [string, number][] }) {
  if (reasons.length === 0) return null;
  return (
    <p class="quiet" data-missing>
      Hatched: no value. {reasons.map(([reason, rows]) => `${reason}: ${rows} ${rows === 1 ? 'row' : 'rows'}`).join(', ')}.
    </p>
  );
}
