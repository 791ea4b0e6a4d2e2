//! Logging: to stderr, one line per event, as text with fields or as JSON; under journald with each line's priority.

use std::env;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::sync::OnceLock;

use tracing::{Level, Metadata, Subscriber, warn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::config::LogFormat;
use crate::style::has_colour;

/// The filter in effect, by which [`set_level`] replaces it; not set where `RUST_LOG` counts.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Starts logging events of `level` and above to stderr; the variable `RUST_LOG` overrides it. Only the first call in a
/// process has an effect.
///
/// The libraries stay at warnings unless `RUST_LOG` sets another level; the MQTT libraries are almost completely off
/// then, as they print keys and passwords.
pub fn init(level: Level, format: LogFormat) {
    let requested = env::var("RUST_LOG").ok().filter(|text| !text.is_empty());
    let parsed = requested.as_deref().and_then(|text| EnvFilter::try_new(text).ok());
    let is_overridden = parsed.is_some();
    let (filter, handle) = reload::Layer::new(parsed.unwrap_or_else(|| EnvFilter::new(directives(level))));
    let is_journal = is_journal();
    let output = Output { writer: io::stderr, has_priority: is_journal };
    let lines = lines(format, output, has_colour(&io::stderr()), !is_journal);
    let first = tracing_subscriber::registry().with(filter).with(lines).try_init();
    if first.is_ok() && !is_overridden {
        let _ = FILTER.set(handle);
        if let Some(requested) = requested {
            warn!(RUST_LOG = ?requested, "log filter not understood, the configured level counts");
        }
    }
}

/// Sets the level of the log, unless `RUST_LOG` is set.
pub fn set_level(level: Level) {
    if let Some(filter) = FILTER.get() {
        // It fails only when logging has ended.
        let _ = filter.reload(EnvFilter::new(directives(level)));
    }
}

/// Writes events in this form. The time is left out where journald adds its own.
fn lines<S, W>(
    format: LogFormat,
    output: Output<W>,
    has_colour: bool,
    has_time: bool,
) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let layer = fmt::layer().with_writer(output);
    match format {
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
        LogFormat::Text if has_time => layer.with_ansi(has_colour).boxed(),
        LogFormat::Text => layer.with_ansi(has_colour).without_time().boxed(),
    }
}

/// Whether stderr is a stream to journald (`systemd.exec(5)`, `$JOURNAL_STREAM`).
fn is_journal() -> bool {
    let stream = env::var("JOURNAL_STREAM").ok();
    let stderr = io::stderr().as_fd().try_clone_to_owned().and_then(|stderr| File::from(stderr).metadata());
    match (stream, stderr) {
        (Some(stream), Ok(stderr)) => stream == format!("{}:{}", stderr.dev(), stderr.ino()),
        _ => false,
    }
}

/// The target of lines about admin calls, which are logged at every level.
pub const AUDIT: &str = "wgkex_audit";

/// The filter for `level`. actix-http is off: it logs an error for every invalid request, so that a stranger could fill
/// the log. rumqttc and rumqttd are off, even for errors: they print whole packets (`Invalid incoming packet`,
/// `NotConnectPacket`), and with them keys and passwords, and an error for every message to a client that has just
/// left. The MQTT session and the embedded server log the important events themselves.
fn directives(level: Level) -> String {
    format!(
        "warn,wgkex_common={level},wgkex_broker={level},wgkex_worker={level},wgkex_kernel={level},{AUDIT}=info,\
         actix_http=off,rumqttc=off,rumqttd=off"
    )
}

/// The destination of lines.
struct Output<W> {
    writer: W,
    /// Whether each line begins with its priority, as `<4>` (`sd-daemon(3)`).
    has_priority: bool,
}

impl<'a, W: MakeWriter<'a>> MakeWriter<'a> for Output<W> {
    type Writer = OneLine<W::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        OneLine { writer: self.writer.make_writer(), priority: None }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Self::Writer {
        let priority = self.has_priority.then(|| priority(*event.level()));
        OneLine { writer: self.writer.make_writer_for(event), priority }
    }
}

/// The priority of syslog (RFC 5424 section 6.2.1) for a level.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

/// Keeps each event, which is one write, on one line, whatever text from outside it contains.
struct OneLine<W> {
    writer: W,
    priority: Option<u8>,
}

impl<W: Write> Write for OneLine<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = event.strip_suffix(b"\n").unwrap_or(event);
        let mut line = Vec::with_capacity(event.len() + 4);
        line.extend(self.priority.into_iter().flat_map(|priority| [b'<', b'0' + priority, b'>']));
        for byte in text {
            match byte {
                b'\n' => line.extend(b"\\n"),
                b'\r' => line.extend(b"\\r"),
                byte => line.push(*byte),
            }
        }
        line.push(b'\n');
        self.writer.write_all(&line).map(|()| event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use tracing::{debug, error, info, warn};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The lines that `events` logs at `level`.
    fn logged(level: Level, events: impl FnOnce()) -> Vec<String> {
        logged_as(LogFormat::Text, false, level, events)
    }

    fn logged_as(format: LogFormat, is_journal: bool, level: Level, events: impl FnOnce()) -> Vec<String> {
        let sink = Sink::default();
        let writer = sink.clone();
        let output = Output { writer: move || writer.clone(), has_priority: is_journal };
        let lines = lines(format, output, false, !is_journal);
        let subscriber = tracing_subscriber::registry().with(EnvFilter::new(directives(level))).with(lines);
        tracing::subscriber::with_default(subscriber, events);
        let text = String::from_utf8(sink.0.lock().clone()).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn our_events_follow_the_level_and_libraries_stay_at_warnings() {
        let lines = logged(Level::DEBUG, || {
            debug!(target: "wgkex_worker::plan", peers = 3, "planned");
            info!(target: "actix_server::builder", "starting");
            warn!(target: "actix_server::builder", "odd");
        });
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].ends_with("wgkex_worker::plan: planned peers=3"), "{lines:?}");
        let lines = logged(Level::WARN, || {
            info!(target: "wgkex_broker", "hidden");
            warn!(target: "wgkex_broker", "shown");
        });
        assert_eq!(lines.len(), 1, "{lines:?}");
    }

    #[test]
    fn packets_and_frequent_events_are_not_logged_by_default() {
        let lines = logged(Level::DEBUG, || {
            error!(target: "rumqttc::state", "Invalid incoming packet = {:?}", "password");
            error!(target: "rumqttd::server::broker", error = "NotConnectPacket(Publish)");
            error!(target: "rumqttd::link::remote", error = "Login");
            error!(target: "actix_http::h1::dispatcher", "stream error: request parse error");
            warn!(target: "rumqttd::router::routing", packet = "Login", "Unexpected packet received");
            error!(target: "wgkex_broker", "shown");
        });
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].contains("shown"), "{lines:?}");
    }

    #[test]
    fn an_event_is_one_line_whatever_it_shows() {
        let text = "first\nERROR forged\r\n";
        let lines = logged(Level::INFO, || info!(target: "wgkex_broker", payload = %text, "refused"));
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].contains("payload=first\\nERROR forged\\r\\n"), "{lines:?}");
    }

    #[test]
    fn journald_gets_the_priority_of_each_line_and_no_time() {
        let lines = logged_as(LogFormat::Text, true, Level::DEBUG, || {
            error!(target: "wgkex_broker", peers = 3, "worst");
            warn!(target: "wgkex_broker", "odd");
            info!(target: "wgkex_broker", "news");
            debug!(target: "wgkex_broker", "detail");
        });
        assert_eq!(
            lines,
            [
                "<3>ERROR wgkex_broker: worst peers=3",
                "<4> WARN wgkex_broker: odd",
                "<6> INFO wgkex_broker: news",
                "<7>DEBUG wgkex_broker: detail"
            ]
        );
    }

    #[test]
    fn json_has_the_fields_of_an_event_beside_its_message() {
        for is_journal in [false, true] {
            let lines = logged_as(LogFormat::Json, is_journal, Level::INFO, || {
                warn!(target: "wgkex_broker", peers = 3, text = %"a\n\"b", "odd");
            });
            let [line] = lines.as_slice() else { panic!("{lines:?}") };
            let line = if is_journal { line.strip_prefix("<4>").unwrap() } else { line };
            let event: serde_json::Value = serde_json::from_str(line).unwrap();
            assert!(event["timestamp"].is_string(), "{line}");
            assert_eq!((&event["level"], &event["target"]), (&"WARN".into(), &"wgkex_broker".into()));
            assert_eq!(
                (&event["message"], &event["peers"], &event["text"]),
                (&"odd".into(), &3.into(), &"a\n\"b".into())
            );
        }
    }
}
