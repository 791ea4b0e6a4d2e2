//! A configured domain: its name on the wire and the names of its two interfaces.

use std::borrow::Borrow;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// A domain this fleet serves (contract section 2). Cheap to clone; compared, ordered and looked up by name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Domain {
    name: Arc<str>,
    rest: usize,
}

/// Why a configured name is no valid domain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DomainError {
    /// It begins with none of `domain_prefixes`, so no router could use it.
    #[error("{0:?} begins with none of domain_prefixes")]
    NoPrefix(String),
    /// The names of its interfaces would be invalid (`IFNAMSIZ` in linux/if.h, `dev_valid_name` in net/core/dev.c).
    #[error(
        "{0:?} gives the interface name \"wg-{1}\": 1 to 12 characters without \"/\", \":\" or spaces may follow \"wg-\""
    )]
    Interface(String, String),
    /// It is not a valid level of an MQTT topic.
    #[error("{0:?} cannot be part of an MQTT topic: \"/\", \"+\", \"#\" and control characters are not allowed")]
    Topic(String),
}

/// Whether `name` is a valid level of a topic (MQTT 3.1.1 section 4.7).
#[must_use]
pub fn is_topic_level(name: &str) -> bool {
    !name.is_empty() && !name.contains(['/', '+', '#']) && !name.chars().any(char::is_control)
}

impl Domain {
    /// The longest that may follow `wg-`: interface names have at most 15 characters.
    const REST_MAX: usize = 12;

    /// Checks `name`; for the names of the interfaces the first of `prefixes`, in their order, that it begins with is
    /// cut off.
    pub fn new(name: &str, prefixes: &[String]) -> Result<Self, DomainError> {
        let rest = prefixes
            .iter()
            .find_map(|prefix| name.strip_prefix(prefix.as_str()))
            .ok_or_else(|| DomainError::NoPrefix(name.into()))?;
        if !is_topic_level(name) {
            return Err(DomainError::Topic(name.into()));
        }
        let unfit = |c: char| c == '/' || c == ':' || c.is_whitespace();
        if rest.is_empty() || rest.len() > Self::REST_MAX || rest.contains(unfit) {
            return Err(DomainError::Interface(name.into(), rest.into()));
        }
        Ok(Self { name: name.into(), rest: name.len() - rest.len() })
    }

    /// The name in requests of routers and in topics.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The part of the name after the prefix, which the interfaces are named after.
    #[must_use]
    pub fn interface_suffix(&self) -> &str {
        &self.name[self.rest..]
    }

    /// The WireGuard interface, `wg-REST`.
    #[must_use]
    pub fn wireguard(&self) -> String {
        format!("wg-{}", self.interface_suffix())
    }

    /// The VXLAN interface, `vx-REST`.
    #[must_use]
    pub fn vxlan(&self) -> String {
        format!("vx-{}", self.interface_suffix())
    }
}

impl Hash for Domain {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

impl Borrow<str> for Domain {
    fn borrow(&self) -> &str {
        self.name()
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(name: &str) -> Result<Domain, DomainError> {
        Domain::new(name, &["ffmuc_".into(), "ffmuc_muc_".into(), "ffdon_".into()])
    }

    #[test]
    fn the_first_prefix_that_fits_is_cut_off() {
        let city = domain("ffmuc_muc_cty").unwrap();
        assert_eq!((city.wireguard().as_str(), city.vxlan().as_str()), ("wg-muc_cty", "vx-muc_cty"));
        assert_eq!(domain("ffdon_ffmuc_x").unwrap().interface_suffix(), "ffmuc_x");
    }

    #[test]
    fn names_that_no_interface_or_topic_can_have_are_refused() {
        assert!(matches!(domain("welt"), Err(DomainError::NoPrefix(_))));
        assert!(matches!(domain("xffmuc_welt"), Err(DomainError::NoPrefix(_))));
        assert!(matches!(domain("ffmuc_"), Err(DomainError::Interface(..))));
        assert!(domain("ffmuc_123456789012").is_ok());
        assert!(matches!(domain("ffmuc_1234567890123"), Err(DomainError::Interface(..))));
        assert!(matches!(domain("ffmuc_a b"), Err(DomainError::Interface(..))));
        for name in ["ffmuc_a/b", "ffmuc_+", "ffmuc_#", "ffmuc_\n"] {
            assert!(matches!(domain(name), Err(DomainError::Topic(_))), "{name:?}");
        }
    }
}
