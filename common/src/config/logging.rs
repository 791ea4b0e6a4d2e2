//! The level and the format of the log: `log_level`, else the level of the original's `logging_config`; `log_format`.

use serde_json::Value;
use tracing::Level;

use super::diagnostics::{Diagnostics, Path};
use super::value::{LogLevel, text, value_type};

/// The format of a line of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// Text for people, with fields as `name=value`.
    #[default]
    Text,
    /// A JSON object.
    Json,
}

value_type!(
    Format(LogFormat),
    |value: &Value| match text(value)?.as_str() {
        "text" => Some(LogFormat::Text),
        "json" => Some(LogFormat::Json),
        _ => None,
    },
    "must be text or json"
);

/// `log_level`, else the level in the original's `logging_config`.
pub(super) fn log_level(own: Option<LogLevel>, logging_config: Option<&Value>, diagnostics: &mut Diagnostics) -> Level {
    let foreign = logging_config.and_then(|config| config.pointer("/root/level")).filter(|level| !level.is_null());
    match (own, foreign) {
        (Some(level), _) => level.0,
        (None, None) => Level::INFO,
        (None, Some(value)) => match serde_json::from_value::<LogLevel>(value.clone()) {
            Ok(level) => level.0,
            Err(error) => {
                diagnostics.invalid(&Path::of("logging_config.root.level"), value, &error.to_string());
                Level::INFO
            }
        },
    }
}
