"""Pipeline: joins the library's parts by a recipe in a run directory, stage by stage."""
