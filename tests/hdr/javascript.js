// Interval logs with the JavaScript HdrHistogram (npm: hdr-histogram-js); see python.py.
const fs = require("fs");
const hdr = require("hdr-histogram-js");

const build = () => hdr.build({ bitBucketSize: 64, numberOfSignificantValueDigits: 3, autoResize: true });

function write(path) {
  let text = "";
  const log = new hdr.HistogramLogWriter((line) => (text += line));
  log.outputComment("[written by the JavaScript HdrHistogram]");
  log.outputLogFormatVersion();
  // It leaves a blank line behind this.
  log.outputStartTime(1_700_000_000_000);
  log.outputLegend();
  const [first, second, empty] = [build(), build(), build()];
  for (let n = 1; n <= 1000; n++) first.recordValue(n * 1000);
  for (let n = 0; n < 100; n++) second.recordValue(5_000_000);
  second.tag = "second";
  [first, second, empty].forEach((histogram, index) =>
    log.outputIntervalHistogram(histogram, index + 1, index + 2, 1e6)
  );
  fs.writeFileSync(path, text);
}

const figures = (h) =>
  [h.totalCount, (h.totalCount ? h.mean : 0).toFixed(0), h.totalCount ? h.minNonZeroValue : 0, h.maxValue].join(" ");

function read(path) {
  const reader = new hdr.HistogramLogReader(fs.readFileSync(path, "utf-8"), 64);
  const total = build();
  for (let h; (h = reader.nextIntervalHistogram()); total.add(h)) {
    console.log("interval", h.tag === "NO TAG" ? "-" : h.tag, figures(h));
  }
  console.log("total", figures(total));
}

({ write, read })[process.argv[2]](process.argv[3]);
