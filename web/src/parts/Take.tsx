// Take away exactly what is shown: as Python, as a command line, as a file of numbers.
import { useState } from 'preact/hooks';
import { getBlob, query, type Args } from '../engine';

export interface TakeProps {
  python: string;
  cli: string;
  file: { name: string; path: string; args: Args } | { name: string; text: () => string };
}

export const quote = (text: string) => `"${text.replaceAll('\\', '\\\\').replaceAll('"', '\\"')}"`;
export const shell = (text: string) => (/^[\w./:=,-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

export function Take({ python, cli, file }: TakeProps) {
  const [said, say] = useState('');
  const [open, setOpen] = useState<'' | 'python' | 'cli'>('');
  const copy = async (kind: 'python' | 'cli', text: string) => {
    setOpen(kind);
    try {
      await navigator.clipboard.writeText(text);
      say('Copied.');
    } catch {
      say('Copy it from here:');
    }
  };
  const save = async () => {
    say('Downloading …');
    try {
      const blob = 'path' in file ? await getBlob(file.path, file.args) : new Blob([file.text()], { type: file.name.endsWith('.json') ? 'application/json' : 'text/csv' });
      const link = document.createElement('a');
      link.href = URL.createObjectURL(blob);
      link.download = file.name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
      say(`${file.name}: saved.`);
    } catch (error) {
      say(error instanceof Error ? error.message : String(error));
    }
  };
  return (
    <div class="take">
      <button type="button" onClick={() => copy('python', python)}>Copy as Python</button>
      <button type="button" onClick={() => copy('cli', cli)}>Copy as CLI</button>
      <button type="button" onClick={save} title={'path' in file ? `/v1${file.path}?${query(file.args)}` : file.name}>Download the numbers</button>
      <span class="quiet" role="status">{said}</span>
      {open && <pre data-take={open} tabIndex={0}>{open === 'python' ? python : cli}</pre>}
    </div>
  );
}
