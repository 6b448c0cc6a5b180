"""`metatt-scale doctor`: what this machine has, with a verdict for each line. It is what a bug report asks for.

`answers` holds what needs heavy libraries or may hang; it runs in a process of its own, which `ask` starts and
watches. The other modules turn facts into lines; their functions are pure, so that every case is tested without the
machine that has it. `command` prints the lines.
"""
