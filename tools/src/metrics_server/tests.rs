use super::*;
use colo_ring_tests::openmetrics;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use std::fmt;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// A source of one guest with a name that a stranger has chosen, and as many others as make a large page.
struct Fake {
    made: Arc<AtomicU32>,
    guests: u32,
    is_stuck: bool,
}

#[derive(Debug)]
struct Figures {
    histogram: PhaseHistogram,
    guests: u32,
}

impl Source for Fake {
    fn collect(&mut self) {}

    async fn figures(&mut self) -> Option<Box<dyn Collector>> {
        self.made.fetch_add(1, Ordering::Relaxed);
        if self.is_stuck {
            std::future::pending::<()>().await;
        }
        let histogram = PhaseHistogram::default();
        for us in [0, 300, 2_000, 20_000_000] {
            histogram.record(Duration::from_micros(us));
        }
        Some(Box::new(Figures {
            histogram,
            guests: self.guests,
        }))
    }
}

const NAME: &str = "we\"b}\\,\n3";

impl Collector for Figures {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut families = Families::new(encoder);
        let labels = || vec![("guest", NAME.to_owned())];
        families.build()?;
        families.infos(
            About::new("colo_ring_guest", "About the guest"),
            [(labels(), vec![("machine", "pc".to_owned())])],
        )?;
        families.histograms(
            About::seconds("colo_ring_pause", "Pauses"),
            [(labels(), &self.histogram)],
        )?;
        families.counters(About::bytes("colo_ring_received", "Bytes"), [(labels(), 5)])?;
        families.gauges(About::new("colo_ring_none", "Nothing has it"), [])?;
        let all = (0..self.guests).map(|n| (vec![("n", n.to_string())], f64::from(n)));
        families.gauges(About::new("colo_ring_many", "Many"), all)
    }
}

struct Bench {
    _server: MetricsServer,
    made: Arc<AtomicU32>,
    address: SocketAddr,
}

impl Bench {
    fn start(guests: u32) -> Self {
        let listener =
            MetricsListener::obtain(&"tcp:127.0.0.1:0".parse().unwrap(), &PassedSockets::default()).unwrap();
        let ListenAddress::Tcp(address) = *listener.address() else {
            panic!("a TCP address was asked for");
        };
        let made = Arc::new(AtomicU32::new(0));
        let source = Fake {
            made: made.clone(),
            guests,
            is_stuck: false,
        };
        Self {
            _server: listener.serve(source, || ()).unwrap(),
            made,
            address,
        }
    }

    fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).unwrap()
    }

    fn ask(&self, request: &str) -> (String, Vec<u8>) {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap();
        let body = answer.split_off(end + 4);
        (String::from_utf8(answer).unwrap(), body)
    }

    fn scrape(&self, accept: &str) -> (String, Vec<u8>) {
        self.ask(&format!(
            "GET /metrics HTTP/1.1\r\nHost: here\r\nAccept: {accept}\r\n\r\n"
        ))
    }
}

#[test]
fn a_page_keeps_the_rules_of_its_format() {
    let bench = Bench::start(0);
    let (head, body) = bench.scrape("*/*");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("application/openmetrics-text"), "{head}");
    let text = String::from_utf8(body).unwrap();
    let page = openmetrics::Page::read(&text).unwrap_or_else(|rule| panic!("{rule} in\n{text}"));
    let guest = ("guest", "we\\\"b}\\\\,\\n3");
    assert_eq!(page.families["colo_ring_pause_seconds"], "histogram");
    assert_eq!(page.value("colo_ring_pause_seconds_count", &[guest]), Some(4.0));
    let bucket = page.value("colo_ring_pause_seconds_bucket", &[guest, ("le", "0.0025")]);
    assert_eq!(bucket, Some(3.0));
    assert_eq!(page.value("colo_ring_received_bytes_total", &[guest]), Some(5.0));
    assert_eq!(
        page.value("colo_ring_guest_info", &[guest, ("machine", "pc")]),
        Some(1.0)
    );
    assert!(!text.contains("colo_ring_none"));
    let (head, body) = bench.scrape("text/plain;version=0.0.4");
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    assert!(!String::from_utf8(body).unwrap().contains("# EOF"));
    let protobuf =
        "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited";
    let (head, body) = bench.scrape(protobuf);
    assert!(head.contains("application/vnd.google.protobuf"), "{head}");
    assert!(!body.is_empty());
    let (head, body) = bench.ask("HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(
        head.contains(&format!("Content-Length: {}\r\n", text.len())),
        "{head}"
    );
    assert!(body.is_empty());
}

#[test]
fn clients_that_are_silent_or_deaf_keep_no_scraper_out() {
    let bench = Bench::start(50_000);
    let silent: Vec<_> = (0..40).map(|_| bench.connect()).collect();
    // More than the buffers of both ends take.
    let deaf: Vec<_> = (0..20)
        .map(|_| {
            let mut stream = bench.connect();
            stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
            stream
        })
        .collect();
    let (head, body) = bench.scrape("*/*");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(body.len() > 1 << 20 && body.ends_with(b"# EOF\n"));
    // The first of them were closed for the others.
    for mut stream in silent.into_iter().take(40 - CLIENTS_MAX) {
        assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
    }
    drop(deaf);
}

#[test]
fn what_is_no_request_is_answered_and_ended() {
    let bench = Bench::start(0);
    let large = format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(9 << 10));
    for (request, status) in [
        ("QEVM\0\0\0\x03\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("DELETE /metrics HTTP/1.1\r\n\r\n", "405"),
        (&large, "431"),
    ] {
        let mut stream = bench.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).unwrap();
        assert_eq!(head, format!("HTTP/1.1 {status}").as_bytes());
    }
    assert!(bench.scrape("*/*").0.starts_with("HTTP/1.1 200 OK\r\n"));
}

#[test]
fn many_scrapers_are_given_one_page() {
    let bench = Bench::start(0);
    let begin = Instant::now();
    (0..20).for_each(|_| drop(bench.scrape("*/*")));
    let most = begin.elapsed().as_secs() / FRESH.as_secs() + 1;
    let made = bench.made.load(Ordering::Relaxed);
    assert!(u64::from(made) <= most, "{made} pages in {most} s");
}

/// Clients in any number that are ended while figures are asked for do not ask more often than others.
#[test]
fn figures_are_asked_for_once_in_a_while_whoever_waits_for_them() {
    let source = Fake {
        made: Arc::default(),
        guests: 0,
        is_stuck: true,
    };
    let made = source.made.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    let begin = Instant::now();
    runtime.unwrap().block_on(async {
        let page = Mutex::new(Page::new(source));
        // However long the process stands meanwhile.
        let asked = || made.load(Ordering::Relaxed);
        while begin.elapsed() < 2 * FRESH || (asked() < 2 && begin.elapsed() < 100 * FRESH) {
            let client = timeout(FRESH / 50, get(&page, http::Format::Text));
            assert!(client.await.is_err());
        }
    });
    let most = begin.elapsed().as_secs() / FRESH.as_secs() + 1;
    let made = made.load(Ordering::Relaxed);
    assert!((2..=most).contains(&u64::from(made)), "{made} times in {most} s");
}

#[test]
fn a_unix_socket_is_removed_at_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("metrics");
    let listener =
        MetricsListener::obtain(&ListenAddress::Unix(path.clone()), &PassedSockets::default()).unwrap();
    let source = Fake {
        made: Arc::default(),
        guests: 0,
        is_stuck: false,
    };
    let server = listener.serve(source, || ()).unwrap();
    let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with("# EOF\n"), "{answer}");
    drop(server);
    assert!(!path.exists());
}
