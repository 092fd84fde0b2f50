// What every view knows of the store: its path (for commands to copy) and whether something is captured now.
import { createContext } from 'preact';
import { useContext } from 'preact/hooks';
import type { Status } from '../engine';

export const StoreContext = createContext<Status | null>(null);
export const useStore = (): Status | null => useContext(StoreContext);
export const usePath = (): string => useStore()?.store.path ?? 'captures';
