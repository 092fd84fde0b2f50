import { useEffect, useRef } from 'preact/hooks';
import uPlot from 'uplot';
import 'uplot/dist/uPlot.min.css';
import { shown } from '../colour';

/** Half a bar's room on either side, where uPlot would cut the first and the last in two. */
function padded(plot: uPlot, low: number, high: number): [number, number] {
  const x = plot.data[0];
  const half = x.length > 1 ? ((x[1] ?? 0) - (x[0] ?? 0)) / 2 : 0.5;
  return [low - half, high + half];
}

/** Lines or bars over a common x. Colours follow the page's theme. */
export function Chart({ name, x, series, bars, height = 180, xLabel, xName, log, time }: {
  name: string; x: ArrayLike<number>; series: { label: string; values: ArrayLike<number | null>; colour?: string }[]; bars?: boolean; height?: number; xLabel?: string; xName?: (x: number) => string; log?: boolean; time?: boolean;
}) {
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const form = `${series.map((s) => s.label).join()} ${bars} ${height} ${log} ${time}`;
  useEffect(() => {
    const element = box.current;
    if (!element) return;
    const style = getComputedStyle(element);
    const colour = (variable: string) => style.getPropertyValue(variable).trim();
    const palette = [colour('--accent'), colour('--second'), colour('--third'), colour('--fourth'), colour('--quiet')];
    const axis = { stroke: colour('--quiet'), grid: { stroke: colour('--line'), width: 1 }, ticks: { stroke: colour('--line') }, font: '11px system-ui' };
    const drawing: Partial<uPlot.Series> = bars && uPlot.paths.bars ? { paths: uPlot.paths.bars({ size: [0.96, Infinity, 1] }), points: { show: false } } : { points: { show: false } };
    const whole = xName || (!time && Array.from(x).every(Number.isInteger));
    const options: uPlot.Options = {
      width: element.clientWidth || 400, height, legend: { show: series.length > 1 }, cursor: { drag: { x: true, y: false } },
      scales: { x: { time: time ?? false, ...(bars ? { range: padded } : {}) }, y: log ? { distr: 3 } : {} },
      axes: [{ ...axis, size: 32, ...(xLabel ? { label: xLabel, labelSize: 18, labelFont: '12px system-ui' } : {}), ...(whole ? { incrs: [1, 2, 4, 8, 16, 32, 64] } : {}), ...(xName ? { space: 76, values: (_: uPlot, at: number[]) => at.map(xName) } : {}) }, { ...axis, size: 64 }],
      series: [{ label: xLabel ?? 'at', value: (_: uPlot, at: number | null) => (at === null ? '' : xName ? xName(at) : time ? new Date(at * 1000).toLocaleTimeString() : shown(at)) }, ...series.map((s, i) => ({ label: s.label, value: (_: uPlot, v: number | null) => (v === null ? '' : shown(v)), stroke: s.colour ?? palette[i % palette.length] ?? '', width: 1.5, ...(bars ? { fill: s.colour ?? palette[i % palette.length] ?? '' } : {}), ...drawing }))],
    };
    plot.current = new uPlot(options, [x, ...series.map((s) => s.values)] as unknown as uPlot.AlignedData, element);
    const watch = new ResizeObserver(() => plot.current?.setSize({ width: element.clientWidth, height }));
    watch.observe(element);
    return () => {
      watch.disconnect();
      plot.current?.destroy();
      plot.current = null;
    };
  }, [form]);
  useEffect(() => plot.current?.setData([x, ...series.map((s) => s.values)] as unknown as uPlot.AlignedData), [x, series]);
  return <div class="chart" ref={box} role="img" aria-label={name} />;
}
