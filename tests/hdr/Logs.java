// Interval logs with the Java HdrHistogram (Debian: libhdrhistogram-java); see python.py.
import org.HdrHistogram.EncodableHistogram;
import org.HdrHistogram.Histogram;
import org.HdrHistogram.HistogramLogReader;
import org.HdrHistogram.HistogramLogWriter;

public class Logs {
    public static void main(String[] args) throws Exception {
        if (args[0].equals("write")) {
            write(args[1]);
        } else {
            read(args[1]);
        }
    }

    static void write(String path) throws Exception {
        HistogramLogWriter log = new HistogramLogWriter(path);
        log.outputComment("[written by the Java HdrHistogram]");
        log.outputLogFormatVersion();
        log.outputStartTime(1_700_000_000_000L);
        log.setBaseTime(1_700_000_000_000L);
        log.outputBaseTime(1_700_000_000_000L);
        log.outputLegend();
        Histogram[] intervals = {new Histogram(3), new Histogram(3), new Histogram(3)};
        for (long n = 1; n <= 1000; n++) {
            intervals[0].recordValue(n * 1000);
        }
        intervals[1].recordValueWithCount(5_000_000, 100);
        intervals[1].setTag("second");
        for (int index = 0; index < intervals.length; index++) {
            log.outputIntervalHistogram(index + 1, index + 2, intervals[index], 1e6);
        }
        log.close();
    }

    static String figures(Histogram h) {
        long count = h.getTotalCount();
        return count + " " + Math.round(count > 0 ? h.getMean() : 0) + " " + (count > 0 ? h.getMinValue() : 0) + " " + h.getMaxValue();
    }

    static void read(String path) throws Exception {
        HistogramLogReader reader = new HistogramLogReader(path);
        Histogram total = new Histogram(3);
        EncodableHistogram next;
        while ((next = reader.nextIntervalHistogram()) != null) {
            Histogram h = (Histogram) next;
            System.out.println("interval " + (h.getTag() == null ? "-" : h.getTag()) + " " + figures(h));
            total.add(h);
        }
        System.out.println("total " + figures(total));
    }
}
