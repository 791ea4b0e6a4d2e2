//! The registry in which each room registers its own metrics.

pub use wgkex_common::runtime::metrics::{MetricsRegistry, set};

/// Fails unless each of these lines is in the text.
#[cfg(test)]
pub(crate) fn assert_has(registry: &MetricsRegistry, lines: &[&str]) {
    let text = String::from_utf8(registry.text().unwrap()).unwrap();
    for line in lines {
        assert!(text.lines().any(|found| found == *line), "{line} is missing in\n{text}");
    }
}
