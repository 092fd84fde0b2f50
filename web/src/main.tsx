import { render } from 'preact';
import { takeToken } from './address';
import { rememberToken } from './engine';
import { Shell } from './Shell';
import './style.css';

rememberToken(takeToken());
addEventListener('hashchange', () => {
  const token = takeToken();
  if (token) rememberToken(token);
});
render(<Shell />, document.body);
