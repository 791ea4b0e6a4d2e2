//! The domains of refused requests, in the log: each name once, so that an operator sees which domains routers request
//! that are not in the config. Anyone may send any name, so the lines are few and short. No IO, no clock.

use std::time::Instant;

use wgkex_common::PublicKey;
use wgkex_common::runtime::logged_once::LoggedOnce;

/// The longest name that is shown whole, in characters.
const SHOWN_MAX: usize = 32;
/// The part that is shown of a longer one, and of a key.
const SHOWN_CHARS: usize = 8;

/// The names that were logged.
#[derive(Debug)]
pub struct RefusedDomains(LoggedOnce<String>);

impl RefusedDomains {
    /// None yet.
    pub fn new(now: Instant) -> Self {
        Self(LoggedOnce::new(now))
    }

    /// A request for a domain with this name was refused. The text of the name for the log, if it is to be there.
    pub fn on_refused(&mut self, name: &str, now: Instant) -> Option<String> {
        let shown = shown(name);
        self.0.is_due(shown.clone(), now).then_some(shown)
    }
}

/// A bounded text of plain characters, and never a key.
fn shown(name: &str) -> String {
    let is_long = name.chars().nth(SHOWN_MAX).is_some() || name.parse::<PublicKey>().is_ok();
    let plain = |c: char| if c.is_alphanumeric() || "_-.".contains(c) { c } else { '?' };
    let text: String = name.chars().take(if is_long { SHOWN_CHARS } else { SHOWN_MAX }).map(plain).collect();
    if is_long { text + "..." } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_logged_once_as_it_is_shown() {
        let now = Instant::now();
        let mut refused = RefusedDomains::new(now);
        assert_eq!(refused.on_refused("ffmuc_gone", now).as_deref(), Some("ffmuc_gone"));
        assert_eq!(refused.on_refused("ffmuc_gone", now), None);
        let long = |end: &str| "x".repeat(40) + end;
        assert_eq!(refused.on_refused(&long("1"), now).as_deref(), Some("xxxxxxxx..."));
        assert_eq!(refused.on_refused(&long("2"), now), None, "it would be the same line");
    }

    #[test]
    fn a_name_is_short_and_plain_and_no_key() {
        assert_eq!(shown("ff_ä.b-1"), "ff_ä.b-1");
        assert_eq!(shown("a\n\u{1b}[31m\"b"), "a??31m?b".replace("31m", "?31m"));
        assert_eq!(shown(&"x".repeat(4000)), "xxxxxxxx...");
        assert_eq!(shown("TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g="), "TszFS3oF...");
        assert_eq!(shown(""), "");
    }
}
