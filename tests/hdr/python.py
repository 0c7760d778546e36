"""Interval logs with the Python HdrHistogram (PyPI: hdrhistogram).

    python.py write LOG          writes the log that every tool here writes
    python.py read LOG           prints what is in a log, as `interval TAG COUNT SUM MIN MAX` and a total;
                                 no percentiles, because libraries round their ranks differently
"""

import sys

from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader, HistogramLogWriter

HOUR_NS = 3600 * 10**9


def write(path):
    # Windows' line ends, as this library writes there.
    with open(path, "w", encoding="utf-8", newline="\r\n") as file:
        log = HistogramLogWriter(file)
        log.output_comment("[written by the Python HdrHistogram]")
        log.output_log_format_version()
        log.output_base_time(1_700_000_000_000)
        log.output_legend()
        first, second, empty = (HdrHistogram(1, HOUR_NS, 3) for _ in range(3))
        for n in range(1, 1001):
            first.record_value(n * 1000)
        second.record_value(5_000_000, 100)
        for start, histogram in enumerate([first, second, empty], start=1):
            log.output_interval_histogram(histogram, start, start + 1)


def figures(histogram):
    # The sum and not the mean: a mean that ends in a half may be rounded either way.
    sum_ns = round(histogram.get_mean_value() * histogram.get_total_count()) if histogram.get_total_count() else 0
    figures = [histogram.get_total_count(), sum_ns, histogram.get_min_value(), histogram.get_max_value()]
    return " ".join(str(figure) for figure in figures)


def read(path):
    total = HdrHistogram(1, HOUR_NS, 3)
    reader = HistogramLogReader(path, total)
    while (histogram := reader.get_next_interval_histogram()) is not None:
        print("interval", histogram.get_tag() or "-", figures(histogram))
        # The library takes the minimum of an empty one for a measured 0.
        if histogram.get_total_count():
            total.add(histogram)
    print("total", figures(total))


{"write": write, "read": read}[sys.argv[1]](sys.argv[2])
