//! Why a worker did not install a key, or removed it: one enum from the worker's plan over MQTT to the broker's answer.

use serde::{Deserialize, Serialize};
use strum::{AsRefStr, Display, EnumIter, EnumString, IntoEnumIterator as _};

/// The longest reason of another program's version that is kept, in characters.
const OTHER_MAX: usize = 64;

/// Why a key is not, or no longer, in a worker's kernel. The text is used on the wire, in metrics and in the log.
#[derive(Debug, Clone, PartialEq, Eq, AsRefStr, Display, EnumIter, EnumString, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum RejectReason {
    /// It is the key of the gateway's own interface.
    #[strum(serialize = "own key")]
    OwnKey,
    /// A gateway has the key, or the address derived from it.
    #[strum(serialize = "reserved")]
    Reserved,
    /// Another key has the address derived from it.
    #[strum(serialize = "address taken")]
    AddressTaken,
    /// The interface has no room for another peer.
    #[strum(serialize = "full")]
    Full,
    /// An access list denies the key.
    #[strum(serialize = "denied")]
    Denied,
    /// The key was installed and was removed: it was swept, or evicted for another.
    #[strum(serialize = "removed")]
    Removed,
    /// The peer of a denied key stays, since another program altered it.
    #[strum(serialize = "altered by somebody else")]
    Altered,
    /// The domain has no interface.
    #[strum(serialize = "interface")]
    Interface,
    /// The interface's tables changed while they were read, again and again.
    #[strum(serialize = "interrupted")]
    Interrupted,
    /// The kernel refused a change.
    #[strum(serialize = "kernel")]
    Kernel,
    /// A reason that this version does not know, truncated to 64 characters.
    #[strum(default, transparent)]
    Other(Box<str>),
}

impl RejectReason {
    /// The reasons why a requested key is not in the kernel: those that workers count.
    pub fn of_requested_keys() -> impl Iterator<Item = Self> {
        Self::iter().filter(|reason| match reason {
            Self::OwnKey
            | Self::Reserved
            | Self::AddressTaken
            | Self::Full
            | Self::Denied
            | Self::Interface
            | Self::Interrupted
            | Self::Kernel => true,
            Self::Removed | Self::Altered | Self::Other(_) => false,
        })
    }
}

impl From<String> for RejectReason {
    fn from(mut text: String) -> Self {
        if let Some((end, _)) = text.char_indices().nth(OTHER_MAX) {
            text.truncate(end);
        }
        text.parse().unwrap_or_else(|_| Self::Other(text.into()))
    }
}

impl From<RejectReason> for String {
    fn from(reason: RejectReason) -> Self {
        reason.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_text_on_the_wire() {
        for (reason, text) in [
            (RejectReason::OwnKey, "own key"),
            (RejectReason::Reserved, "reserved"),
            (RejectReason::AddressTaken, "address taken"),
            (RejectReason::Full, "full"),
            (RejectReason::Denied, "denied"),
            (RejectReason::Removed, "removed"),
            (RejectReason::Altered, "altered by somebody else"),
            (RejectReason::Interface, "interface"),
            (RejectReason::Interrupted, "interrupted"),
            (RejectReason::Kernel, "kernel"),
            (RejectReason::Other("of a newer version".into()), "of a newer version"),
        ] {
            let json = serde_json::to_string(&reason).unwrap();
            assert_eq!((json, reason.as_ref()), (format!("{text:?}"), text));
            assert_eq!(serde_json::from_str::<RejectReason>(&format!("{text:?}")).unwrap(), reason);
        }
    }

    #[test]
    fn a_long_unknown_reason_is_cut_between_characters() {
        let reason = RejectReason::from(format!("x{}", "ü".repeat(1_000)));
        assert_eq!(reason.as_ref(), format!("x{}", "ü".repeat(63)));
    }
}
