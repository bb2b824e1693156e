def write_report(runs, out): return ""
