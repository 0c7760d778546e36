//! As much of HTTP/1.1 as a scraper needs: one GET, one answer, the end.

use std::io;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Most bytes of a request's head.
const HEAD_MAX: usize = 8 << 10;

/// Most lines of it.
const HEADERS_MAX: usize = 64;

/// A form of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// OpenMetrics 1.0, as text.
    OpenMetrics,
    /// Prometheus' older text.
    Text,
    /// Prometheus' messages, which alone have native histograms.
    Protobuf,
}

impl Format {
    pub(super) const ALL: [Self; 3] = [Self::OpenMetrics, Self::Text, Self::Protobuf];

    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::Protobuf => {
                "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
            }
        }
    }

    /// The one that a header `Accept` prefers; OpenMetrics where it names none of them.
    fn accepted(accept: &str) -> Self {
        let mut best = (0.0, Self::OpenMetrics);
        for range in accept.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or("").to_ascii_lowercase();
            let parameters: Vec<_> = parts.filter_map(|part| part.split_once('=')).collect();
            let parameter = |name: &str| {
                let found = parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.trim_matches('"'))
            };
            let is = |name, wanted: &str| parameter(name) == Some(wanted);
            let may_be = |name, wanted: &str| parameter(name).is_none_or(|value| value == wanted);
            let format = match &*kind {
                "application/openmetrics-text" if may_be("version", "1.0.0") => Self::OpenMetrics,
                "application/vnd.google.protobuf"
                    if is("proto", "io.prometheus.client.MetricFamily") && is("encoding", "delimited") =>
                {
                    Self::Protobuf
                }
                "text/plain" | "text/*" if may_be("version", "0.0.4") => Self::Text,
                "*/*" | "application/*" => Self::OpenMetrics,
                _ => continue,
            };
            let quality = parameter("q").map_or(1.0, |q| q.parse::<f32>().unwrap_or(0.0));
            if quality > best.0 {
                best = (quality, format);
            }
        }
        best.1
    }
}

/// A request that is understood.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) format: Format,
    /// Whether the page itself is wanted, and not only what is said of it.
    has_body: bool,
}

/// Why a request has no page for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Malformed,
    NotFound,
    Method,
    TooLarge,
    /// The process does not answer.
    Unavailable,
}

impl Refusal {
    fn status(self) -> &'static str {
        match self {
            Self::Malformed => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::Method => "405 Method Not Allowed",
            Self::TooLarge => "431 Request Header Fields Too Large",
            Self::Unavailable => "503 Service Unavailable",
        }
    }
}

/// Reads a request's head.
///
/// # Errors
/// If the connection ends before.
pub(super) async fn read_request(stream: &mut UnixStream) -> io::Result<Result<Request, Refusal>> {
    let mut head = Vec::with_capacity(HEAD_MAX);
    loop {
        let room = HEAD_MAX - head.len();
        if room == 0 {
            return Ok(Err(Refusal::TooLarge));
        }
        // `read_buf` reads as much as there is room for.
        if stream.read_buf(&mut head).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(request) = parse(&head) {
            return Ok(request);
        }
    }
}

/// The request, once its head is complete.
fn parse(head: &[u8]) -> Option<Result<Request, Refusal>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return None,
        Err(httparse::Error::TooManyHeaders) => return Some(Err(Refusal::TooLarge)),
        Err(_) => return Some(Err(Refusal::Malformed)),
    }
    let path = request.path.unwrap_or("");
    if path.split('?').next() != Some("/metrics") {
        return Some(Err(Refusal::NotFound));
    }
    let has_body = match request.method {
        Some("GET") => true,
        Some("HEAD") => false,
        _ => return Some(Err(Refusal::Method)),
    };
    let accept: Vec<_> = (request.headers.iter())
        .filter(|header| header.name.eq_ignore_ascii_case("accept"))
        .filter_map(|header| std::str::from_utf8(header.value).ok())
        .collect();
    Some(Ok(Request {
        format: Format::accepted(&accept.join(",")),
        has_body,
    }))
}

/// Answers, and ends the connection.
///
/// # Errors
/// If the client has gone.
pub(super) async fn respond(
    stream: &mut UnixStream,
    request: Result<Request, Refusal>,
    page: Option<Arc<[u8]>>,
) -> io::Result<()> {
    let answer = request.and_then(|request| Ok((request, page.ok_or(Refusal::Unavailable)?)));
    let (status, kind, body, has_body) = match answer {
        Ok((request, page)) => ("200 OK", request.format.content_type(), page, request.has_body),
        Err(refusal) => {
            let text = format!("{}\nGET /metrics\n", refusal.status());
            (
                refusal.status(),
                "text/plain; charset=utf-8",
                text.into_bytes().into(),
                true,
            )
        }
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    if has_body {
        stream.write_all(&body).await?;
    }
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scraper_gets_what_it_prefers() {
        const PROTOBUF: &str =
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited";
        for (accept, format) in [
            // As Prometheus 2.42 and 3 send it, without and with native histograms.
            (
                "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                 text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                Format::OpenMetrics,
            ),
            (
                &format!("{PROTOBUF};q=0.6,application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.2"),
                Format::Protobuf,
            ),
            ("text/plain", Format::Text),
            ("Text/Plain; Version=\"0.0.4\"", Format::Text),
            ("*/*", Format::OpenMetrics),
            ("", Format::OpenMetrics),
            ("text/html, image/png;q=nonsense", Format::OpenMetrics),
            ("application/vnd.google.protobuf", Format::OpenMetrics),
            ("application/openmetrics-text;version=2.0.0", Format::OpenMetrics),
            ("text/plain;q=0,text/plain;q=0.3", Format::Text),
        ] {
            assert_eq!(Format::accepted(accept), format, "{accept}");
        }
    }

    #[test]
    fn what_is_no_request_for_the_page_is_refused() {
        let get = |text: &str| parse(text.as_bytes());
        let page = |has_body| {
            let format = Format::OpenMetrics;
            Some(Ok(Request { format, has_body }))
        };
        assert_eq!(get("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), page(true));
        assert_eq!(get("HEAD /metrics?a=b HTTP/1.0\r\n\r\n"), page(false));
        assert_eq!(get("GET /metrics HTTP/1.1\r\nHost: x\r\n"), None);
        assert_eq!(get(""), None);
        assert_eq!(get("GET / HTTP/1.1\r\n\r\n"), Some(Err(Refusal::NotFound)));
        assert_eq!(
            get("GET /metrics/.. HTTP/1.1\r\n\r\n"),
            Some(Err(Refusal::NotFound))
        );
        assert_eq!(get("POST /metrics HTTP/1.1\r\n\r\n"), Some(Err(Refusal::Method)));
        assert_eq!(get("\0\0\0\x04"), Some(Err(Refusal::Malformed)));
        let many = "a: b\r\n".repeat(HEADERS_MAX + 1);
        assert_eq!(
            get(&format!("GET /metrics HTTP/1.1\r\n{many}\r\n")),
            Some(Err(Refusal::TooLarge))
        );
    }
}
