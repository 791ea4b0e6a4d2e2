//! The registry in which each room registers its own metrics.
//!
//! No task. Owner: `run` of the broker, which passes it to each room. Previous stop of a number: the room that counts;
//! next stop: [`crate::http`], which serves `/metrics`. No key passes here.

pub use wgkex_common::runtime::metrics::{MetricsRegistry, set};

/// Fails unless each of these lines is in the text.
#[cfg(test)]
pub(crate) fn assert_has(registry: &MetricsRegistry, lines: &[&str]) {
    let text = String::from_utf8(registry.text().unwrap()).unwrap();
    for line in lines {
        assert!(text.lines().any(|found| found == *line), "{line} is missing in\n{text}");
    }
}
