//! MQTT servers that others run, with what they do and do not do.

mod mosquitto;
mod nats;
mod rabbitmq;
