"""Reports of the commands as data, by what they tell; `json_form` gives their JSON form."""
