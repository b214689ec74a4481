"""Pages for people, on the text-to-image application: compare models, look at runs, choose between pictures without names."""
