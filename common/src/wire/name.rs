//! The names of programs on the bus: each is one level of a topic, validated when it is parsed.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::is_topic_level;

/// A text that is no valid name of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("is not one level of a topic: \"/\", \"+\", \"#\" and control characters are not allowed")]
pub struct NameError;

/// A name that is one level of a topic. Clones share the text; compared, ordered and looked up by it.
macro_rules! topic_level {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// The text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// `+`: every name there is, in a filter.
            #[must_use]
            pub fn any() -> Self {
                Self("+".into())
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                if is_topic_level(text) { Ok(Self(text.into())) } else { Err(NameError) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.as_str().into()
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                self.as_str()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self.as_str(), f)
            }
        }
    };
}

topic_level! {
    /// The name of a worker.
    WorkerName
}
topic_level! {
    /// The name of a broker.
    BrokerName
}
topic_level! {
    /// The name of this machine, which is that of its worker and of its broker.
    HostName
}

impl From<&HostName> for WorkerName {
    fn from(name: &HostName) -> Self {
        Self(Arc::clone(&name.0))
    }
}

impl From<&HostName> for BrokerName {
    fn from(name: &HostName) -> Self {
        Self(Arc::clone(&name.0))
    }
}

/// A program that exchanges keys by MQTT.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Participant {
    /// The worker of this name.
    Worker(WorkerName),
    /// The broker of this name.
    Broker(BrokerName),
}

impl Participant {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Worker(name) => name.as_str(),
            Self::Broker(name) => name.as_str(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_level_of_a_topic_and_plain_text_in_json() {
        let name: WorkerName = "gw04.in.ffmuc.net".parse().unwrap();
        assert_eq!((name.to_string().as_str(), format!("{name:?}").as_str()), (name.as_str(), "\"gw04.in.ffmuc.net\""));
        let json = serde_json::to_string(&name).unwrap();
        assert_eq!(json, "\"gw04.in.ffmuc.net\"");
        assert_eq!(serde_json::from_str::<WorkerName>(&json).unwrap(), name);
        for text in ["", "a/b", "+", "#", "a\n", "\u{0}"] {
            assert_eq!(text.parse::<BrokerName>(), Err(NameError), "{text:?}");
            assert!(serde_json::from_str::<BrokerName>(&serde_json::to_string(text).unwrap()).is_err());
        }
    }
}
