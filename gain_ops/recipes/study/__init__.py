"""The work of ``gain-ops study``: several methods adapt one model to domains in turn, and what each forgets is measured."""
