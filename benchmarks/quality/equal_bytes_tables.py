def tables(rows):
    return ""


def plot(rows, file):
    pass
