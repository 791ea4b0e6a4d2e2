//! Logging: to stderr, one line per event, as fields.

use std::io::{self, IsTerminal as _, Write};

use tracing::Level;
use tracing_subscriber::EnvFilter;

/// Starts logging events of `level` and above to stderr; the variable `RUST_LOG` overrides it. Only the first call
/// in a process counts.
///
/// The libraries stay at warnings unless `RUST_LOG` asks for more; of the MQTT ones hardly anything is logged then,
/// as they print keys and passwords.
pub fn init(level: Level) {
    let asked = std::env::var("RUST_LOG").unwrap_or_default();
    let asked_filter = if asked.is_empty() { None } else { Some(EnvFilter::try_new(&asked)) };
    let is_unreadable = matches!(asked_filter, Some(Err(_)));
    let filter = asked_filter.and_then(Result::ok).unwrap_or_else(|| EnvFilter::new(directives(level)));
    let first = tracing_subscriber::fmt()
        .with_writer(|| OneLine(io::stderr()))
        .with_ansi(io::stderr().is_terminal())
        .with_env_filter(filter)
        .try_init();
    if first.is_ok() && is_unreadable {
        tracing::warn!(RUST_LOG = ?asked, "log filter not understood, the configured level counts");
    }
}

/// The target of lines about admin calls, which are logged at every level.
pub const AUDIT: &str = "wgkex_audit";

/// What is logged at `level`. Nothing of actix-http: it has an error for every request that is none, so that a stranger
/// could fill the log. Nothing of rumqttc and rumqttd, not even errors: they print packets whole (`Invalid
/// incoming packet`, `NotConnectPacket`), and with them keys and passwords, and an error for every message to a client
/// that has just left. The MQTT session and the embedded server log what matters of that.
fn directives(level: Level) -> String {
    format!(
        "warn,wgkex_common={level},wgkex_broker={level},wgkex_worker={level},wgkex_kernel={level},{AUDIT}=info,\
         actix_http=off,rumqttc=off,rumqttd=off"
    )
}

/// Keeps each event, which comes as one write, on one line, whatever text from outside it shows.
struct OneLine<W>(W);

impl<W: Write> Write for OneLine<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = event.strip_suffix(b"\n").unwrap_or(event);
        let mut line = Vec::with_capacity(event.len() + 1);
        for byte in text {
            match byte {
                b'\n' => line.extend(b"\\n"),
                b'\r' => line.extend(b"\\r"),
                byte => line.push(*byte),
            }
        }
        line.push(b'\n');
        self.0.write_all(&line).map(|()| event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use tracing::{debug, error, info, warn};

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The lines that `events` logs at `level`.
    fn logged(level: Level, events: impl FnOnce()) -> Vec<String> {
        let sink = Shared::default();
        let writer = sink.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || OneLine(writer.clone()))
            .with_ansi(false)
            .with_env_filter(EnvFilter::new(directives(level)))
            .finish();
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
}
