from .method import Attend, EchoAtt, Echo
